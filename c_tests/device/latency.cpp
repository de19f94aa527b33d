// From the producer's store to a consumer's pop, and back to the producer by a credit, between two threads.
//
//   latency [ROUNDS]
#include <pthread.h>

#include <algorithm>
#include <vector>

#include "producer.h"
#include "ringest_device.cuh"

namespace device = ringest::device;

static uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

struct course {
    queue* q;
    std::vector<uint64_t> seen;
};

static void* observe(void* argument) {
    course& c = *static_cast<course*>(argument);
    device::consumer<device::thread_group, RINGEST_CONSUME_MODE_SINGLE> consumer(c.q->view, 0);
    for (uint64_t& seen : c.seen) {
        device::slot item;
        CHECK(consumer.wait_pop(item, UINT64_MAX) == RINGEST_OUTCOME_OK);
        seen = now();
        consumer.release(item);
    }
    return nullptr;
}

static void figure(const char* what, std::vector<uint64_t> ns) {
    std::sort(ns.begin(), ns.end());
    printf("figure: %s: p50 %llu ns, p99 %llu ns\n", what, static_cast<unsigned long long>(ns[ns.size() / 2]),
           static_cast<unsigned long long>(ns[ns.size() * 99 / 100]));
}

int main(int argc, char** argv) {
    const size_t rounds = argc > 1 ? strtoull(argv[1], nullptr, 10) : 200000;
    CHECK(rounds > 0);
    queue q(RINGEST_CONSUME_MODE_SINGLE, 2);
    course c = {&q, std::vector<uint64_t>(rounds)};
    std::vector<uint64_t> there(rounds), back(rounds), start(rounds);
    pthread_t thread;
    CHECK(pthread_create(&thread, nullptr, observe, &c) == 0);
    for (size_t i = 0; i < rounds; i++) {
        q.describe(0, 0, 0);
        start[i] = now();
        q.finish();
        // On one core the other thread has to run as well.
        for (uint32_t looks = 1; get<uint64_t>(q.released(i)) != i + 1; looks++)
            if (looks % 4096 == 0) sched_yield();
        back[i] = now() - start[i];
    }
    CHECK(pthread_join(thread, nullptr) == 0);
    for (size_t i = 0; i < rounds; i++) there[i] = c.seen[i] - start[i];
    figure("host consumer, store to pop", there);
    figure("host consumer, store to credit", back);
}
