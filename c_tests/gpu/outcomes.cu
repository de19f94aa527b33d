// What a producer says reaches a kernel that is running already, and what a kernel says reaches the producer and the
// other blocks: END, ABORTED, POISON, TIMEOUT. Needs a GPU.
#include <ringest.h>
#include <ringest_device.cuh>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace rd = ringest::device;

constexpr uint64_t second = 1000000000;

struct found {
    uint32_t outcome;
    int32_t error;
    uint32_t good, bad;
    int32_t status;  // of the last poisoned slot
    uint32_t wrong;  // words that are not what the host wrote
    uint32_t tail;   // what wait_tail says of the sequence 0, and of one that never comes
    uint32_t beyond;
};

// What a kernel does beside consuming.
enum what : uint32_t { consume, abort_third, look_at_tail };

__device__ unsigned running;

__global__ void consumer(ringest_io_queue_view view, what action, uint64_t patience, found* results) {
    __shared__ rd::block_group::storage storage;
    const rd::block_group block(storage);
    rd::consumer<rd::block_group> queue(view, blockIdx.x, block);
    if (threadIdx.x == 0) atomicAdd_system(&running, 1u);
    found f = {};
    if (action == look_at_tail) {
        f.tail = rd::wait_tail(view, 0, patience, block);
        f.beyond = rd::wait_tail(view, 1000, patience, block, &f.error);
    } else {
        for (rd::slot item;;) {
            f.outcome = queue.wait_pop(item, patience);
            if (f.outcome == RINGEST_OUTCOME_POISON) {
                f.bad++;
                f.status = item.status;
            } else if (f.outcome == RINGEST_OUTCOME_OK) {
                f.good++;
                const uint64_t* words = reinterpret_cast<const uint64_t*>(item.data);
                for (uint32_t i = threadIdx.x; i < item.bytes / 8; i += blockDim.x)
                    if (words[i] != item.sequence * 0x9e3779b97f4a7c15 + i) atomicAdd(&results[blockIdx.x].wrong, 1u);
                if (action == abort_third && item.sequence == 2) rd::abort(view, -ENOTRECOVERABLE);
            } else {
                break;
            }
            queue.release(item);
        }
        f.error = queue.error();
        queue.hand_back();
    }
    block.sync();
    if (threadIdx.x != 0) return;
    f.wrong = results[blockIdx.x].wrong;
    results[blockIdx.x] = f;
}

static int failures;

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            failures++;                                                              \
            std::printf("line %d: %s does not hold\n", __LINE__, #condition);         \
        }                                                                            \
    } while (0)

static void cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::printf("CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

static void done(int32_t rc) {
    if (rc >= 0) return;
    std::printf("ringest: %s\n", ringest_last_error());
    std::exit(1);
}

static ringest_buffer* pinned(uint64_t bytes) {
    void *host, *device;
    ringest_buffer* buffer;
    cuda(cudaHostAlloc(&host, bytes, cudaHostAllocMapped));
    cuda(cudaHostGetDevicePointer(&device, host, 0));
    std::memset(host, 0, bytes);
    done(ringest_buffer_from_host(host, bytes, reinterpret_cast<uint64_t>(device), &buffer));
    return buffer;
}

// For the device block: the host never touches it.
static ringest_buffer* on_device(uint64_t bytes) {
    void* memory;
    ringest_buffer* buffer;
    cuda(cudaMalloc(&memory, bytes));
    cuda(cudaMemset(memory, 0, bytes));
    cuda(cudaDeviceSynchronize());
    const auto release = [](void* of) { cudaFree(of); };
    done(ringest_buffer_from_bar1_peer(memory, bytes, reinterpret_cast<uint64_t>(memory), release, memory, &buffer));
    return buffer;
}

// A queue in memory of the CUDA runtime's, and a kernel that runs on it.
struct scene {
    ringest_io_queue* queue = nullptr;
    ringest_io_queue_view view = {};
    found* results = nullptr;
    cudaStream_t stream = nullptr;
    uint32_t blocks;

    scene(uint32_t blocks, what action, uint64_t patience) : blocks(blocks) {
        ringest_io_queue_options options = {};
        options.size = sizeof options;
        options.slots = 8;
        options.slot_bytes = 4096;
        options.alignment = 128;  // what any memory of cudaHostAlloc has
        options.mode = RINGEST_CONSUME_MODE_CLAIMED;
        options.consumers = blocks;
        ringest_io_queue_sizes sizes;
        done(ringest_io_queue_layout(&options, &sizes));
        done(ringest_io_queue_create_in(&options, pinned(sizes.control), pinned(sizes.credit), on_device(sizes.device),
                                        pinned(sizes.slots), &queue));
        done(ringest_io_queue_device_view(queue, &view));
        cuda(cudaHostAlloc(&results, blocks * sizeof(found), cudaHostAllocMapped));
        std::memset(results, 0, blocks * sizeof(found));
        cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        const unsigned none = 0;
        cuda(cudaMemcpyToSymbol(running, &none, sizeof none));
        consumer<<<blocks, 128, 0, stream>>>(view, action, patience, results);
        cuda(cudaGetLastError());
        // It runs before anything is published.
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }

    // Publishes so many, the sequence `poisoned` with a status. False: the queue was aborted meanwhile.
    bool publish(uint64_t count, uint64_t poisoned = UINT64_MAX) {
        for (uint64_t i = 0; i < count;) {
            ringest_slot slot;
            const int32_t rc = ringest_io_queue_reserve(queue, &slot);
            if (rc == -EAGAIN) continue;
            if (rc < 0) return false;
            ringest_slot_data data = {};
            if (slot.sequence == poisoned) {
                data.status = -EIO;
            } else {
                data.bytes = 4096;
                for (uint64_t k = 0; k < 512; k++)
                    static_cast<uint64_t*>(slot.data)[k] = slot.sequence * 0x9e3779b97f4a7c15 + k;
            }
            if (ringest_io_queue_publish(queue, slot.sequence, &data) < 0) return false;
            i++;
        }
        return true;
    }

    // Waits for the kernel; the milliseconds it took.
    double wait() {
        const auto began = std::chrono::steady_clock::now();
        cuda(cudaStreamSynchronize(stream));
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count();
    }

    uint64_t sum(uint32_t found::*field) const {
        uint64_t total = 0;
        for (uint32_t i = 0; i < blocks; i++) total += results[i].*field;
        return total;
    }

    bool all(uint32_t outcome, int32_t error) const {
        for (uint32_t i = 0; i < blocks; i++)
            if (results[i].outcome != outcome || results[i].error != error) return false;
        return true;
    }

    ~scene() {
        cuda(cudaStreamSynchronize(stream));
        CHECK(sum(&found::wrong) == 0);
        CHECK(ringest_io_queue_destroy(queue) == -EBUSY);  // until the kernel has stopped
        CHECK(ringest_io_queue_consumers_stopped(queue) == 0);
        CHECK(ringest_io_queue_destroy(queue) == 0);
        cuda(cudaStreamDestroy(stream));
    }
};

static void end(uint32_t blocks) {
    scene s(blocks, consume, 10 * second);
    CHECK(s.publish(10000));
    CHECK(ringest_io_queue_finish(s.queue) == 1);
    std::printf("END: %u blocks ended %.3f ms later\n", blocks, s.wait());
    CHECK(s.all(RINGEST_OUTCOME_END, 0) && s.sum(&found::good) == 10000);
}

static void abort_by_host(uint32_t blocks) {
    scene s(blocks, consume, 10 * second);
    CHECK(s.publish(3));
    CHECK(ringest_io_queue_abort(s.queue, ECANCELED) == 1);
    std::printf("ABORT by the host: %u blocks ended %.3f ms later\n", blocks, s.wait());
    CHECK(s.all(RINGEST_OUTCOME_ABORTED, -ECANCELED) && s.sum(&found::good) <= 3);
}

static void abort_by_kernel(uint32_t blocks) {
    scene s(blocks, abort_third, 10 * second);
    s.publish(1000000);  // until refused
    CHECK(ringest_io_queue_aborted(s.queue) == ENOTRECOVERABLE);
    std::printf("ABORT by one block: %u blocks ended, the host was told, %.3f ms later\n", blocks, s.wait());
    CHECK(s.all(RINGEST_OUTCOME_ABORTED, -ENOTRECOVERABLE));
    CHECK(s.sum(&found::good) < 1000);
}

static void poison(uint32_t blocks) {
    scene s(blocks, consume, 10 * second);
    CHECK(s.publish(20, 7));
    CHECK(ringest_io_queue_finish(s.queue) == 1);
    std::printf("POISON: %u blocks went on to the END, %.3f ms later\n", blocks, s.wait());
    CHECK(s.all(RINGEST_OUTCOME_END, 0) && s.sum(&found::good) == 19 && s.sum(&found::bad) == 1);
    bool told = false;
    for (uint32_t i = 0; i < blocks; i++) told |= s.results[i].status == -EIO;
    CHECK(told);
}

static void timeout(uint32_t blocks) {
    scene s(blocks, consume, second / 5);
    std::printf("TIMEOUT of 200 ms: %u blocks ended %.3f ms after the first 50\n", blocks, s.wait());
    CHECK(s.all(RINGEST_OUTCOME_TIMEOUT, 0) && s.sum(&found::good) == 0);
}

static void tail() {
    {
        scene s(1, look_at_tail, second / 5);
        CHECK(s.publish(1));
        s.wait();
        CHECK(s.results[0].tail == RINGEST_OUTCOME_OK && s.results[0].beyond == RINGEST_OUTCOME_TIMEOUT);
    }
    {
        scene s(1, look_at_tail, 10 * second);
        CHECK(s.publish(1) && ringest_io_queue_finish(s.queue) == 1);
        s.wait();
        CHECK(s.results[0].tail == RINGEST_OUTCOME_OK && s.results[0].beyond == RINGEST_OUTCOME_END);
    }
    {
        scene s(1, look_at_tail, 10 * second);
        CHECK(s.publish(1) && ringest_io_queue_abort(s.queue, EIO) == 1);
        s.wait();
        CHECK(s.results[0].beyond == RINGEST_OUTCOME_ABORTED && s.results[0].error == -EIO);
    }
    scene s(1, look_at_tail, 10 * second);
    CHECK(s.publish(1, 0));
    s.wait();
    CHECK(s.results[0].tail == RINGEST_OUTCOME_POISON && s.results[0].beyond == RINGEST_OUTCOME_POISON);
    std::printf("the tail alone: OK, TIMEOUT, END, ABORTED, POISON\n");
}

int main() {
    int gpus = 0;
    if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) return std::printf("SKIP there is no GPU\n"), 77;
    int all = 1;
    cuda(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, 0));
    for (uint32_t blocks : {1u, 16u, static_cast<uint32_t>(all)}) {
        end(blocks);
        abort_by_host(blocks);
        abort_by_kernel(blocks);
        poison(blocks);
        timeout(blocks);
    }
    tail();
    std::printf(failures == 0 ? "all outcomes arrived\n" : "%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}
