// Consumers whose group is made of several host threads: the same calls in each, the same results in each.
#include <pthread.h>
#include <sched.h>

#include <vector>

#include "producer.h"
#include "ringest_device.cuh"

namespace device = ringest::device;

constexpr uint32_t members = 4;

// What the threads of a group share: a barrier that can be used again, and a value on its way.
struct meeting {
    uint32_t arrived = 0;
    uint32_t round = 0;
    alignas(16) unsigned char value[64] = {};
};

class thread_team {
public:
    thread_team(meeting& where, uint32_t rank) : where_(&where), rank_(rank) {}

    bool leader() const { return rank_ == members - 1; }

    void sync() const {
        const uint32_t round = __atomic_load_n(&where_->round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&where_->arrived, 1, __ATOMIC_ACQ_REL) == members) {
            __atomic_store_n(&where_->arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&where_->round, round + 1, __ATOMIC_RELEASE);
            return;
        }
        while (__atomic_load_n(&where_->round, __ATOMIC_ACQUIRE) == round) sched_yield();
    }

    template <class T>
    T broadcast(T value) const {
        static_assert(sizeof(T) <= sizeof where_->value, "as the group's contract says");
        if (leader()) memcpy(where_->value, &value, sizeof value);
        sync();
        memcpy(&value, where_->value, sizeof value);
        sync();
        return value;
    }

private:
    meeting* where_;
    uint32_t rank_;
};

struct team {
    queue* q;
    uint64_t sequences;
    uint32_t index;
    meeting where;
    // Of each member: what it popped.
    std::vector<uint64_t> popped[members];
    uint64_t handed_back[members];
};

struct member {
    team* of;
    uint32_t rank;
    pthread_t thread;
};

static void* work(void* argument) {
    const member& self = *static_cast<member*>(argument);
    team& t = *self.of;
    device::consumer<thread_team> c(t.q->view, t.index, thread_team(t.where, self.rank));
    // The same in all members.
    xorshift random(t.index);
    t.handed_back[self.rank] = 0;
    for (device::slot item;;) {
        const ringest_outcome outcome = c.wait_pop(item, random.below(100000));
        if (outcome == RINGEST_OUTCOME_TIMEOUT) {
            if (random.below(4) == 0 && c.hand_back()) t.handed_back[self.rank]++;
            continue;
        }
        if (outcome == RINGEST_OUTCOME_END) break;
        CHECK(outcome == RINGEST_OUTCOME_OK && item.bytes == t.q->bytes_of(item.sequence));
        for (uint32_t i = self.rank; i < item.bytes; i += members) CHECK(item.data[i] == byte_of(item.sequence, i));
        t.popped[self.rank].push_back(item.sequence);
        c.release(item);
    }
    const thread_team group(t.where, self.rank);
    CHECK(device::wait_tail(t.q->view, t.sequences - 1, 0, group) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(t.q->view, t.sequences, 0, group) == RINGEST_OUTCOME_END);
    // Everybody learns of an abort, and why.
    group.sync();
    if (group.leader()) device::abort(t.q->view, -ENODEV);
    group.sync();
    device::slot item;
    int32_t error = 0;
    CHECK(c.try_pop(item) == RINGEST_OUTCOME_ABORTED && c.error() == -ENODEV);
    CHECK(c.hand_back() == (t.q->view.mode == RINGEST_CONSUME_MODE_CLAIMED));
    CHECK(device::wait_tail(t.q->view, t.sequences, 0, group, &error) == RINGEST_OUTCOME_ABORTED && error == -ENODEV);
    ringest_io_queue_view stale = t.q->view;
    stale.epoch++;
    device::consumer<thread_team> other(stale, t.index, group);
    CHECK(other.try_pop(item) == RINGEST_OUTCOME_ABORTED && other.error() == -ESTALE);
    return nullptr;
}

static void drain(ringest_consume_mode mode, uint64_t sequences) {
    queue q(mode, 2);
    team t = {&q, sequences, 0, {}, {}, {}};
    member all[members];
    for (uint32_t rank = 0; rank < members; rank++) {
        all[rank] = {&t, rank, {}};
        CHECK(pthread_create(&all[rank].thread, nullptr, work, &all[rank]) == 0);
    }
    while (q.next() < sequences) {
        while (!q.has_room()) sched_yield();
        q.publish();
    }
    q.end();
    for (member& m : all) CHECK(pthread_join(m.thread, nullptr) == 0);
    for (uint32_t rank = 0; rank < members; rank++) {
        CHECK(t.popped[rank].size() == sequences && t.handed_back[rank] == t.handed_back[0]);
        for (uint64_t n = 0; n < sequences; n++) CHECK(t.popped[rank][n] == n);
    }
    printf("mode %d: %llu sequences by %u threads\n", mode, static_cast<unsigned long long>(sequences), members);
}

int main(int argc, char** argv) {
    const uint64_t sequences = argc > 1 ? strtoull(argv[1], nullptr, 10) : 2000;
    for (ringest_consume_mode mode : {RINGEST_CONSUME_MODE_SINGLE, RINGEST_CONSUME_MODE_PARTITIONED,
                                      RINGEST_CONSUME_MODE_CLAIMED, RINGEST_CONSUME_MODE_BROADCAST})
        drain(mode, sequences);
    puts("ok");
}
