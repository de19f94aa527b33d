// Whatever the shared words hold, a consumer comes back with an outcome, and a slot it hands out lies within the slots;
// also while the words change under it. Every part of the queue ends at a page that faults.
//
//   fuzz [EXECUTIONS [SEED]]
#include <pthread.h>

#include <vector>

#include "producer.h"
#include "ringest_device.cuh"

namespace device = ringest::device;

static uint64_t pops, popped, sum;

static void check_slot(const queue& q, const device::slot& item) {
    const unsigned char* first = q.slots.data() + q.place(item.sequence) * q.view.slot_stride;
    CHECK(item.bytes <= q.view.slot_bytes);
    CHECK(item.data >= first && item.data + item.bytes <= first + q.view.slot_stride);
    for (uint32_t i = 0; i < item.bytes; i++) sum += item.data[i];
}

// A value that is likely to matter.
static uint64_t pick(const queue& q, xorshift& random) {
    static const uint64_t limits[] = {0, 1, 2, 3, UINT32_MAX, uint64_t{1} << 32, uint64_t{1} << 63, UINT64_MAX};
    switch (random.below(4)) {
    case 0: return limits[random.below(8)];
    case 1: return limits[random.below(8)] - random.below(3);
    case 2: return random.below(4 * q.view.slot_count);
    default: return random.next();
    }
}

static void scramble(const fenced& part, size_t from, xorshift& random) {
    for (size_t i = from; i < part.size(); i += 8) put<uint64_t>(part.address() + i, random.next());
}

static void mutate(const queue& q, const fenced& part, size_t from, xorshift& random) {
    const uint32_t words = static_cast<uint32_t>((part.size() - from) / 4);
    const uint64_t address = part.address() + from + random.below(words) * 4;
    if (address % 8 == 0 && random.below(2) == 0)
        put<uint64_t>(address, pick(q, random));
    else
        put<uint32_t>(address, static_cast<uint32_t>(pick(q, random)));
}

static void use(const queue& q, xorshift& random) {
    device::consumer<> one(q.view, random.below(q.view.consumers)), two(q.view, random.below(q.view.consumers));
    for (uint32_t step = 1 + random.below(12); step > 0; step--) {
        device::consumer<>& c = random.below(2) == 0 ? one : two;
        device::slot item;
        ringest_outcome outcome;
        switch (random.below(8)) {
        case 0: c.hand_back(); break;
        case 1: outcome = device::wait_tail(q.view, pick(q, random), 0); break;
        case 2: outcome = device::wait_tail(at<ringest_tail_line_words>(q.tail()), pick(q, random), 0); break;
        case 3:
            if (random.below(16) == 0) device::abort(q.view, static_cast<int32_t>(pick(q, random)));
            break;
        default:
            outcome = c.try_pop(item);
            pops++;
            CHECK(outcome <= RINGEST_OUTCOME_TIMEOUT && (outcome == RINGEST_OUTCOME_ABORTED) == (c.error() < 0));
            if (outcome != RINGEST_OUTCOME_OK && outcome != RINGEST_OUTCOME_POISON) break;
            popped++;
            check_slot(q, item);
            if (random.below(4) != 0) c.release(item);
        }
    }
}

static void execute(queue& q, xorshift& random) {
    q.reset();
    // The header mostly stays, or nothing behind it would be looked at.
    const size_t from = random.below(16) == 0 ? 0 : sizeof(ringest_control_header);
    if (random.below(8) == 0) {
        scramble(q.control, from, random);
        scramble(q.credit, random.below(2) * sizeof(uint64_t), random);
        scramble(q.device, 0, random);
    } else {
        for (uint32_t n = random.below(q.view.slot_count + 1); n > 0; n--) q.publish();
        for (uint32_t n = random.below(6); n > 0; n--) mutate(q, q.control, from, random);
        for (uint32_t n = random.below(4); n > 0; n--) mutate(q, q.device, 0, random);
        if (random.below(4) == 0) mutate(q, q.credit, 0, random);
    }
    use(q, random);
}

struct scribbler {
    queue* q;
    uint64_t seed;
    bool stop;
    pthread_t thread;
};

static void* scribble(void* argument) {
    scribbler& self = *static_cast<scribbler*>(argument);
    xorshift random(self.seed);
    while (!__atomic_load_n(&self.stop, __ATOMIC_RELAXED)) {
        mutate(*self.q, self.q->control, sizeof(ringest_control_header), random);
        mutate(*self.q, self.q->device, 0, random);
        // Mostly not aborted, or there would be little to see; mostly something published.
        put<uint32_t>(self.q->view.credit, random.below(64) == 0);
        put<uint32_t>(self.q->state(), random.below(16) == 0 ? random.below(4) : 0);
        const uint64_t n = random.below(self.q->view.slot_count);
        put<uint64_t>(self.q->descriptor(n) + 8, uint64_t{random.below(300)} << 32);
        put<uint64_t>(self.q->descriptor(n), n + 1);
    }
    return nullptr;
}

int main(int argc, char** argv) {
    const uint64_t executions = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1000000;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
    printf("seed %llu\n", static_cast<unsigned long long>(seed));
    // An execution that does not come back ends the program.
    alarm(240);
    xorshift random(seed);
    std::vector<queue*> queues;
    for (uint32_t mode = 0; mode < 4; mode++) {
        for (uint32_t slots : {2u, 4u, 16u}) {
            for (uint32_t consumers : {1u, 3u, 17u}) {
                if (mode == RINGEST_CONSUME_MODE_SINGLE && consumers > 1) continue;
                queues.push_back(new queue(static_cast<ringest_consume_mode>(mode), slots, consumers));
            }
        }
    }
    for (uint64_t i = 0; i < executions; i++)
        execute(*queues[random.below(static_cast<uint32_t>(queues.size()))], random);
    printf("%llu executions: %llu pops, %llu of them gave a slot\n", static_cast<unsigned long long>(executions),
           static_cast<unsigned long long>(pops), static_cast<unsigned long long>(popped));
    CHECK(popped > executions / 20);

    pops = popped = 0;
    const uint64_t rounds = executions / 2;
    for (queue* q : queues) {
        q->reset();
        scribbler other = {q, random.next(), false, {}};
        CHECK(pthread_create(&other.thread, nullptr, scribble, &other) == 0);
        for (uint64_t i = 0; i < rounds / queues.size(); i++) {
            if (random.below(2) == 0) {
                q->reset();
                for (uint32_t n = random.below(q->view.slot_count + 1); n > 0; n--) q->publish();
            }
            use(*q, random);
        }
        __atomic_store_n(&other.stop, true, __ATOMIC_RELAXED);
        CHECK(pthread_join(other.thread, nullptr) == 0);
    }
    printf("%llu executions beside a thread that changes the words: %llu pops, %llu of them gave a slot\n",
           static_cast<unsigned long long>(rounds), static_cast<unsigned long long>(pops),
           static_cast<unsigned long long>(popped));
    CHECK(popped > rounds / 20);
    for (queue* q : queues) delete q;
    printf("ok, sum %llu\n", static_cast<unsigned long long>(sum));
}
