// Consumers and a producer in threads, on queues so small that every slot is used again and again: every sequence is
// popped once (broadcast: once by each), whole.
//
//   stress [SEQUENCES [SEED]]
#include <pthread.h>
#include <sched.h>

#include <vector>

#include "producer.h"
#include "ringest_device.cuh"

namespace device = ringest::device;

// A run of a queue: what its threads share.
struct run {
    run(ringest_consume_mode how, uint32_t slot_count, uint32_t consumers, uint64_t count, uint64_t seed)
        : q(how, slot_count, consumers), sequences(count), random(seed), popped(count, 0) {}

    queue q;
    uint64_t sequences;
    uint64_t random;
    // How often each sequence was popped. Relaxed, so that counting orders nothing.
    std::vector<uint32_t> popped;
    // Stored before the end is told, by an ordinary store: END says that it is there.
    uint64_t last_words = 0;
};

static bool is_poison(uint64_t n) { return n % 13 == 5; }

struct worker {
    run* of;
    uint32_t index;
    pthread_t thread;
};

static void release_all(device::consumer<>& c, std::vector<device::slot>& held, xorshift& random) {
    while (!held.empty()) {
        const uint32_t i = random.below(static_cast<uint32_t>(held.size()));
        c.release(held[i]);
        held[i] = held.back();
        held.pop_back();
    }
}

static void* consume(void* argument) {
    worker* self = static_cast<worker*>(argument);
    run& r = *self->of;
    xorshift random(r.random + self->index);
    device::consumer<> c(r.q.view, self->index);
    std::vector<device::slot> held;
    for (device::slot item;;) {
        const ringest_outcome outcome = c.wait_pop(item, random.below(20000));
        switch (outcome) {
        case RINGEST_OUTCOME_OK:
            CHECK(!is_poison(item.sequence) && item.bytes == r.q.bytes_of(item.sequence));
            CHECK(is_payload(item.data, item.bytes, item.sequence));
            break;
        case RINGEST_OUTCOME_POISON: CHECK(is_poison(item.sequence) && item.status == -EIO); break;
        case RINGEST_OUTCOME_TIMEOUT:
            // What is waited for may need a slot that is held.
            release_all(c, held, random);
            if (random.below(4) == 0) c.hand_back();
            // There may be more threads than cores.
            sched_yield();
            continue;
        case RINGEST_OUTCOME_END:
            CHECK(r.last_words == r.sequences);
            release_all(c, held, random);
            return nullptr;
        // An outcome that nobody caused.
        default: CHECK(outcome == RINGEST_OUTCOME_OK);
        }
        CHECK(item.sequence < r.sequences && item.tag == item.sequence * 3);
        __atomic_fetch_add(&r.popped[item.sequence], 1, __ATOMIC_RELAXED);
        held.push_back(item);
        if (random.below(2) == 0) release_all(c, held, random);
    }
}

static void stress(ringest_consume_mode mode, uint32_t slot_count, uint32_t consumers, uint64_t sequences,
                   uint64_t seed) {
    run r(mode, slot_count, consumers, sequences, seed);
    std::vector<worker> workers(consumers);
    for (uint32_t i = 0; i < consumers; i++) {
        workers[i] = {&r, i, {}};
        CHECK(pthread_create(&workers[i].thread, nullptr, consume, &workers[i]) == 0);
    }
    while (r.q.next() < sequences) {
        while (!r.q.has_room()) sched_yield();
        if (is_poison(r.q.next()))
            r.q.poison(-EIO);
        else
            r.q.publish();
    }
    r.last_words = sequences;
    r.q.end();
    for (worker& w : workers) CHECK(pthread_join(w.thread, nullptr) == 0);
    const uint32_t expected = mode == RINGEST_CONSUME_MODE_BROADCAST ? consumers : 1;
    for (uint64_t n = 0; n < sequences; n++) CHECK(r.popped[n] == expected);
    CHECK(r.q.abort_word() == 0);
    for (uint64_t n = sequences - slot_count; n < sequences; n++) {
        CHECK(get<uint64_t>(r.q.released(n)) == n + 1 && get<uint32_t>(r.q.pending(n)) == 0);
    }
    printf("mode %d, %u slots, %u consumers: %llu sequences\n", mode, slot_count, consumers,
           static_cast<unsigned long long>(sequences));
}

// Readers that only know the tail.
static void* follow(void* argument) {
    run& r = *static_cast<worker*>(argument)->of;
    for (uint64_t n = 0; n < r.sequences; n++) {
        CHECK(device::wait_tail(r.q.view, n, UINT64_MAX) == RINGEST_OUTCOME_OK);
        const unsigned char* data = r.q.slots.data() + r.q.place(n) * r.q.view.slot_stride + queue::offset_of(n);
        CHECK(is_payload(data, r.q.bytes_of(n), n));
    }
    CHECK(device::wait_tail(r.q.view, r.sequences, UINT64_MAX) == RINGEST_OUTCOME_END);
    return nullptr;
}

static void stress_tail(uint64_t rounds) {
    for (uint64_t round = 0; round < rounds; round++) {
        run r(RINGEST_CONSUME_MODE_SINGLE, 64, 1, 64, round);
        worker workers[2];
        for (worker& w : workers) {
            w.of = &r;
            CHECK(pthread_create(&w.thread, nullptr, follow, &w) == 0);
        }
        while (r.q.next() < r.sequences) r.q.publish();
        r.q.end();
        for (worker& w : workers) CHECK(pthread_join(w.thread, nullptr) == 0);
    }
    printf("tail: %llu rounds of 64\n", static_cast<unsigned long long>(rounds));
}

int main(int argc, char** argv) {
    const uint64_t sequences = argc > 1 ? strtoull(argv[1], nullptr, 10) : 10000;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
    printf("seed %llu\n", static_cast<unsigned long long>(seed));
    for (uint32_t slots : {2u, 8u}) {
        stress(RINGEST_CONSUME_MODE_SINGLE, slots, 1, sequences, seed);
        for (uint32_t consumers = 2; consumers <= 4; consumers++) {
            stress(RINGEST_CONSUME_MODE_PARTITIONED, slots, consumers, sequences, seed);
            stress(RINGEST_CONSUME_MODE_CLAIMED, slots, consumers, sequences, seed);
            stress(RINGEST_CONSUME_MODE_BROADCAST, slots, consumers, sequences, seed);
        }
    }
    stress_tail(sequences / 64 + 1);
    puts("ok");
}
