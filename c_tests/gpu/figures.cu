// figures FILE: what to compare an ingest with. A one-thread loop of pread into page-locked memory, and the speed at
// which a GPU's multiprocessors read such memory. Needs a GPU.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

static void cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::printf("CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

// Sums words, 16 bytes for each thread at a time.
__global__ void read_all(const ulonglong2* words, uint64_t count, unsigned long long* sum) {
    unsigned long long own = 0;
    const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
#pragma unroll 4
    for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) own += words[i].x ^ words[i].y;
    atomicAdd(sum, own);
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(double (&values)[5]) {
    std::sort(values, values + 5);
    return values[2];
}

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: figures FILE\n"), 2;
    constexpr uint64_t ring = 64 << 20, block = 1 << 20, zero_copy = 1 << 30;
    unsigned char* memory;
    unsigned long long* sum;
    cuda(cudaHostAlloc(&memory, zero_copy, cudaHostAllocMapped));
    cuda(cudaMalloc(&sum, sizeof *sum));
    const int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0) return std::perror(argv[1]), 1;
    double rates[5];
    for (double& rate : rates) {
        const double began = now();
        uint64_t at = 0;
        for (ssize_t got; (got = pread(fd, memory + at % ring, block, static_cast<off_t>(at))) > 0;)
            at += static_cast<uint64_t>(got);
        rate = static_cast<double>(at) / 1e9 / (now() - began);
    }
    std::printf("figure: pread, one thread, 1 MiB blocks into page-locked memory: %.2f GB/s\n", median(rates));
    for (unsigned blocks : {1u, 16u, 32u}) {
        for (double& rate : rates) {
            cuda(cudaDeviceSynchronize());
            const double began = now();
            read_all<<<blocks, 512>>>(reinterpret_cast<const ulonglong2*>(memory), zero_copy / 16, sum);
            cuda(cudaDeviceSynchronize());
            rate = static_cast<double>(zero_copy) / 1e9 / (now() - began);
        }
        std::printf("figure: %u blocks of 512 threads read page-locked memory at %.2f GB/s\n", blocks, median(rates));
    }
    return 0;
}
