// Everything of ringest_device.cuh, instantiated: for compilers of device code, NVRTC too. scripts/device-check
// compiles it and reads the PTX.
#include "ringest_device.cuh"

namespace rd = ringest::device;

// Every member, of every group and mode.
#define INSTANTIATE(group)                                               \
    template class rd::consumer<group>;                                  \
    template class rd::consumer<group, RINGEST_CONSUME_MODE_SINGLE>;     \
    template class rd::consumer<group, RINGEST_CONSUME_MODE_PARTITIONED>; \
    template class rd::consumer<group, RINGEST_CONSUME_MODE_CLAIMED>;     \
    template class rd::consumer<group, RINGEST_CONSUME_MODE_BROADCAST>

INSTANTIATE(rd::thread_group);
// clang's pass for the host refuses what is for the device alone.
#if defined(__CUDA_ARCH__) || !defined(__clang__)
INSTANTIATE(rd::warp_group);
INSTANTIATE(rd::block_group);
#endif

__device__ unsigned long long sum_of(const rd::slot& item, unsigned rank, unsigned size) {
    unsigned long long sum = 0;
    for (uint32_t i = rank; i < item.bytes; i += size) sum += item.data[i];
    return sum;
}

// A persistent kernel: pops until the end, gives up after a second without a sequence.
template <class Consumer>
__device__ void drain(Consumer& queue, unsigned rank, unsigned size, unsigned long long* sums) {
    for (rd::slot item;;) {
        const ringest_outcome outcome = queue.wait_pop(item, 1000000000);
        if (outcome == RINGEST_OUTCOME_OK) {
            rd::acquire_for_tma();
            atomicAdd(&sums[item.sequence % 64], sum_of(item, rank, size));
        } else if (outcome != RINGEST_OUTCOME_POISON) {
            break;
        }
        queue.release(item);
    }
    queue.hand_back();
    if (queue.error() != 0) atomicAdd(&sums[0], queue.next());
}

extern "C" __global__ void with_threads(ringest_io_queue_view view, unsigned long long* sums) {
    rd::consumer<> queue(view, blockIdx.x * blockDim.x + threadIdx.x);
    drain(queue, 0, 1, sums);
}

extern "C" __global__ void with_warps(ringest_io_queue_view view, unsigned long long* sums) {
    rd::consumer<rd::warp_group> queue(view, (blockIdx.x * blockDim.x + threadIdx.x) / 32, rd::warp_group());
    drain(queue, threadIdx.x % 32, 32, sums);
}

extern "C" __global__ void with_blocks(ringest_io_queue_view view, unsigned long long* sums) {
    __shared__ rd::block_group::storage storage;
    rd::consumer<rd::block_group> queue(view, blockIdx.x, rd::block_group(storage));
    drain(queue, threadIdx.x, blockDim.x, sums);
}

extern "C" __global__ void one_block_one_mode(ringest_io_queue_view view, unsigned long long* sums) {
    __shared__ rd::block_group::storage storage;
    rd::consumer<rd::block_group, RINGEST_CONSUME_MODE_SINGLE> queue(view, 0, rd::block_group(storage));
    drain(queue, threadIdx.x, blockDim.x, sums);
}

extern "C" __global__ void with_tails(ringest_io_queue_view view, const ringest_tail_line_words* line, int* outcomes) {
    __shared__ rd::block_group::storage storage;
    const rd::block_group block(storage);
    int32_t error = 0;
    outcomes[0] = rd::wait_tail(view, 3, 1000);
    outcomes[1] = rd::wait_tail(line, 3, 1000);
    outcomes[2] = rd::wait_tail(view, 3, 1000, block, &error);
    outcomes[3] = rd::wait_tail(line, 3, 1000, rd::warp_group(), &error);
    if (error != 0) rd::abort(view, error);
}

#if !defined(__CUDACC_RTC__)

// The same consumer in host code of the same source.
int on_the_host(const ringest_io_queue_view& view, const ringest_tail_line_words* line) {
    rd::consumer<> queue(view, 0);
    rd::slot item;
    const ringest_outcome outcome = queue.wait_pop(item, 1000);
    if (outcome == RINGEST_OUTCOME_OK) queue.release(item);
    rd::acquire_for_tma();
    return outcome + rd::wait_tail(view, 0, 0) + rd::wait_tail(line, 0, 0);
}

#endif
