// The consumer of `ringest ingest --gpu`: a persistent kernel whose blocks pop slots, compute the CRC32C of each payload,
// and release them, until the io_queue ends.
//
// kernel.ptx is this file compiled for the oldest GPU and driver that it can serve; scripts/device-check says how, and
// whether it still is.
//
// CRC32C is linear. A block reads a payload in rows, 16 bytes for each thread, so that its loads are coalesced. Each of
// a thread's four words is the next of a message of its own, whose other words lie a row apart: the word is added to
// that message's remainder, which is then moved by a row, by four look-ups. At the end each remainder is moved by what
// lies behind it, which is the same for every payload, for rows are filled up with zeros before it: they change nothing.
#include "ringest_device.cuh"

namespace rd = ringest::device;

namespace {

// In a reflected polynomial bit 31 is x^0; multiplying by x shifts right. This one is also x^32, by which a word moves.
constexpr uint32_t polynomial = 0x82f63b78;
constexpr uint32_t one = 0x80000000;

// As gpu.rs has them.
struct record {
    uint64_t tag;
    uint64_t file_offset;
    uint32_t bytes;
    uint32_t crc32c;
    int32_t status;
    uint32_t written;  // 1
};

struct ending {
    uint64_t slots;
    uint64_t bytes;
    uint32_t outcome;
    int32_t error;
};

__device__ uint32_t times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? polynomial : 0); }
__device__ uint32_t divided_by_x(uint32_t a) { return a & one ? (a ^ polynomial) << 1 | 1 : a << 1; }

__device__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = one; bit != 0; bit >>= 1, b = times_x(b)) product ^= a & bit ? b : 0;
    return product;
}

// x to the power of 8 * bytes: what `bytes` more of the message do.
__device__ uint32_t moved_by(uint64_t bytes) {
    uint32_t result = one;
    uint32_t square = one >> 8;
    for (; bytes != 0; bytes >>= 1, square = times(square, square)) {
        if (bytes & 1) result = times(result, square);
    }
    return result;
}

// How the words of a row are moved by a row, byte by byte.
struct tables {
    uint32_t by[4][256];
};

__device__ uint32_t moved_by_row(const tables& row, uint32_t a) {
    return row.by[0][a & 255] ^ row.by[1][a >> 8 & 255] ^ row.by[2][a >> 16 & 255] ^ row.by[3][a >> 24];
}

// The bytes of a word at `address` that lie in [from, to).
__device__ uint32_t within(uint32_t word, uint64_t address, uint64_t from, uint64_t to) {
    for (uint32_t i = 0; i < 4; i++) {
        if (address + i < from || address + i >= to) word &= ~(0xffu << 8 * i);
    }
    return word;
}

// CRC32C of a payload, in thread 0. All threads call it. `behind`: what lies behind this thread's part of the last row.
__device__ uint32_t crc32c(const tables& row, uint32_t behind, uint32_t* partial, const rd::slot& item) {
    const uint64_t from = reinterpret_cast<uint64_t>(item.data);
    const uint64_t to = from + item.bytes;
    const uint64_t first = from / 16;
    const uint64_t vectors = (to + 15) / 16 - first;
    const uint64_t rows = (vectors + blockDim.x - 1) / blockDim.x;
    const uint64_t zeros = rows * blockDim.x - vectors;
    uint32_t state[4] = {0, 0, 0, 0};
    uint32_t last[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (uint64_t i = 0; i < rows; i++) {
        const uint64_t place = i * blockDim.x + threadIdx.x;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (place >= zeros) {
            const uint64_t address = (first + place - zeros) * 16;
            words = *reinterpret_cast<const uint4*>(address);
            if (address < from || address + 16 > to) {
                words.x = within(words.x, address, from, to);
                words.y = within(words.y, address + 4, from, to);
                words.z = within(words.z, address + 8, from, to);
                words.w = within(words.w, address + 12, from, to);
            }
        }
        const uint32_t next[4] = {words.x, words.y, words.z, words.w};
        for (uint32_t k = 0; k < 4; k++) {
            state[k] = moved_by_row(row, last[k]);
            last[k] = state[k] ^ next[k];
        }
    }
    // The words of a vector follow each other, and lie before what is behind the vector.
    uint32_t sum = 0;
    for (uint32_t k = 0; k < 4; k++) sum = times(sum ^ last[k], polynomial);
    sum = times(sum, behind);
    for (uint32_t lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(0xffffffff, sum, lane);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    for (uint32_t warp = 1; warp < blockDim.x / 32; warp++) sum ^= partial[warp];
    // The zeros that fill the last vector up.
    for (uint64_t bit = 8 * ((to + 15) / 16 * 16 - to); bit > 0; bit--) sum = divided_by_x(sum);
    return sum;
}

}  // namespace

// Pops until the end, or until nothing comes for `patience` ns: then the queue is aborted. Blocks are of whole warps, one
// block for each consumer of the view. `records` has a place for each of the first `capacity` sequences.
extern "C" __global__ void __launch_bounds__(512)
    ringest_consume(ringest_io_queue_view view, record* records, uint64_t capacity, ending* endings,
                    uint64_t patience) {
    __shared__ rd::block_group::storage storage;
    __shared__ tables row;
    __shared__ uint32_t partial[32];
    const uint32_t by_row = moved_by(uint64_t{blockDim.x} * 16);
    for (uint32_t i = threadIdx.x; i < 1024; i += blockDim.x)
        row.by[i / 256][i % 256] = times((i % 256) << 8 * (i / 256), by_row);
    const uint32_t behind = moved_by(uint64_t{blockDim.x - 1 - threadIdx.x} * 16);
    __syncthreads();

    rd::consumer<rd::block_group> queue(view, blockIdx.x, rd::block_group(storage));
    ending end = {0, 0, 0, 0};
    uint32_t start_bytes = 0;
    uint32_t start = 0xffffffff;  // the CRC's initial value, moved by start_bytes
    for (rd::slot item;;) {
        const ringest_outcome outcome = queue.wait_pop(item, patience);
        end.outcome = outcome;
        if (outcome == RINGEST_OUTCOME_TIMEOUT) rd::abort(view, -110);  // -ETIMEDOUT
        if (outcome != RINGEST_OUTCOME_OK && outcome != RINGEST_OUTCOME_POISON) break;
        uint32_t crc = 0;
        if (outcome == RINGEST_OUTCOME_OK) crc = crc32c(row, behind, partial, item);
        if (threadIdx.x == 0 && item.sequence < capacity) {
            if (item.bytes != start_bytes) {
                start_bytes = item.bytes;
                start = times(0xffffffff, moved_by(item.bytes));
            }
            records[item.sequence] = {item.tag, item.file_offset, item.bytes, ~(crc ^ start), item.status, 1};
        }
        end.slots++;
        if (outcome == RINGEST_OUTCOME_OK) end.bytes += item.bytes;
        queue.release(item);
    }
    queue.hand_back();
    end.error = queue.error();
    if (threadIdx.x == 0) endings[blockIdx.x] = end;
}
