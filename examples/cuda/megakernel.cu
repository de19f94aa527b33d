// A file through an io_queue into a running kernel: its blocks claim slots, sum the bytes, and stop at the queue's end.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <ringest.h>
#include <ringest_device.cuh>

struct result {
    unsigned long long bytes, sum, ended;  // ended: blocks that came to the END
};

__global__ void megakernel(ringest_io_queue_view view, result* found) {
    using namespace ringest::device;
    __shared__ block_group::storage storage;
    consumer<block_group, RINGEST_CONSUME_MODE_CLAIMED> queue(view, blockIdx.x, block_group(storage));
    unsigned long long bytes = 0, sum = 0;
    slot item;
    ringest_outcome outcome;
    // Half a minute without a slot is a failure: no kernel should outlive what feeds it.
    while ((outcome = queue.wait_pop(item, 30000000000)) == RINGEST_OUTCOME_OK) {
        for (uint32_t i = threadIdx.x; i < item.bytes; i += blockDim.x, bytes++) sum += item.data[i];
        queue.release(item);
    }
    queue.hand_back();
    if (outcome != RINGEST_OUTCOME_END) abort(view, -EIO);  // the host and the other blocks learn of it
    atomicAdd(&found->sum, sum);
    atomicAdd(&found->bytes, bytes);
    if (threadIdx.x == 0 && outcome == RINGEST_OUTCOME_END) atomicAdd(&found->ended, 1);
}

static int64_t check(int64_t rc) {
    if (rc < 0) std::fprintf(stderr, "megakernel: %s\n", ringest_last_error()), std::exit(1);
    return rc;
}
static void check_cuda(cudaError_t error) {
    if (error) std::fprintf(stderr, "megakernel: %s\n", cudaGetErrorString(error)), std::exit(1);
}

// Memory that host and device see, or, for what the host never touches, the device's own; for the life of the process.
static ringest_buffer* memory(uint64_t bytes, bool shared) {
    void* at;  // the same on both sides
    ringest_buffer* buffer;
    check_cuda(shared ? cudaHostAlloc(&at, bytes, cudaHostAllocMapped) : cudaMalloc(&at, bytes));
    if (!shared) check_cuda(cudaMemset(at, 0, bytes));
    const auto device = reinterpret_cast<uint64_t>(at);
    check(shared ? ringest_buffer_from_host(at, bytes, device, &buffer)
                 : ringest_buffer_from_bar1_peer(at, bytes, device, [](void*) {}, nullptr, &buffer));
    return buffer;
}

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: megakernel FILE\n"), 2;
    constexpr uint32_t blocks = 16;
    ringest_io_queue_options options = {};  // 64 slots of 1 MiB
    options.size = sizeof options;
    options.mode = RINGEST_CONSUME_MODE_CLAIMED;
    options.consumers = blocks;
    ringest_io_queue_sizes sizes;
    check(ringest_io_queue_layout(&options, &sizes));
    ringest_io_queue* queue;
    ringest_io_queue_view view;
    check(ringest_io_queue_create_in(&options, memory(sizes.control, true), memory(sizes.credit, true),
                                     memory(sizes.device, false), memory(sizes.slots, true), &queue));
    check(ringest_io_queue_device_view(queue, &view));

    // Memory first: an allocation may wait for kernels that run. And a stream that waits for no other.
    result *found, total;
    cudaStream_t stream;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check_cuda(cudaMalloc(&found, sizeof *found));
    check_cuda(cudaMemset(found, 0, sizeof *found));
    check_cuda(cudaDeviceSynchronize());
    megakernel<<<blocks, 512, 0, stream>>>(view, found);
    check_cuda(cudaGetLastError());

    ringest_file* file;
    ringest_ring* ring;
    ringest_driver* driver;
    ringest_driver_options waiting = {};
    waiting.size = sizeof waiting;
    waiting.queue_limit = 64;  // reads in line for a slot
    check(ringest_file_open(argv[1], RINGEST_DIRECT_AUTO, &file));
    check(ringest_ring_create(nullptr, &ring));
    check(ringest_driver_create(ring, queue, &waiting, &driver));
    const uint64_t size = check(ringest_file_size(file));
    for (uint64_t done = 0; done < size;) {
        const int64_t accepted = ringest_driver_submit_file(driver, file, done, size - done, 0);
        if (accepted != -EAGAIN) done += check(accepted);
        check(ringest_driver_wait(driver, 1, -1));
        check(ringest_driver_poll(driver));
    }
    check(ringest_driver_finish(driver));
    check(ringest_driver_drain(driver, -1));
    check_cuda(cudaStreamSynchronize(stream));
    check_cuda(cudaMemcpy(&total, found, sizeof total, cudaMemcpyDeviceToHost));
    std::printf("%llu bytes, sum %llu, %llu of %u blocks at the end\n", total.bytes, total.sum, total.ended, blocks);
    check(ringest_driver_close(driver, -1, nullptr) | ringest_io_queue_consumers_stopped(queue));
    check(ringest_io_queue_destroy(queue) | ringest_ring_destroy(ring) | ringest_file_close(file));
    return total.bytes == size && total.ended == blocks ? 0 : 1;
}
