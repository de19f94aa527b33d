// Reads a file twice, by four streams on four threads and by a single one, and compares the checksums.
#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <exception>
#include <future>
#include <memory>
#include <ringest.h>
#include <stdexcept>
#include <vector>

// Every handle is given back by the call that belongs to it.
template <auto Release> struct Releaser {
    template <class T> void operator()(T *handle) const { Release(handle); }
};
using File = std::unique_ptr<ringest_file, Releaser<ringest_file_close>>;
using Mapped = std::unique_ptr<ringest_mapped, Releaser<ringest_mapped_free>>;
using Buffer = std::unique_ptr<ringest_buffer, Releaser<ringest_buffer_release>>;
using Ring = std::unique_ptr<ringest_ring, Releaser<ringest_ring_destroy>>;
using TailLine = std::unique_ptr<ringest_tail_line, Releaser<ringest_tail_line_free>>;
using Stream = std::unique_ptr<ringest_stream, Releaser<ringest_stream_destroy>>;

static int64_t check(int64_t result) {
    if (result < 0) throw std::runtime_error(ringest_last_error());
    return result;
}

// make<Ring>(ringest_ring_create, options): the handle that a call stores by its last argument.
template <class Handle, class Call, class... Args> Handle make(Call call, Args... args) {
    typename Handle::pointer handle = nullptr;
    check(call(args..., &handle));
    return Handle(handle);
}

// Reads len bytes of the file, from offset on, to the same place in the memory. Ring and stream are this thread's.
static void read(const ringest_file *file, const ringest_buffer *memory, uint64_t offset, uint64_t len) {
    constexpr uint64_t block = 1 << 20;
    auto buffer = make<Buffer>(ringest_buffer_sub_region, memory, offset, len);
    auto line = make<TailLine>(ringest_tail_line_alloc);
    auto ring = make<Ring>(ringest_ring_create, nullptr);
    auto stream = make<Stream>(ringest_stream_create, ring.get(), buffer.get(), line.get(), nullptr);
    for (uint64_t at = 0; at < len || check(ringest_stream_inflight(stream.get())) > 0;) {
        while (at < len) {
            auto n = std::min(block, len - at);
            auto sequence = ringest_stream_submit_read_file(stream.get(), file, offset + at, at, n, 0);
            if (sequence == -EAGAIN) break; // enough in flight
            check(sequence);
            at += n;
        }
        check(ringest_stream_wait(stream.get(), 1, -1));
        check(ringest_stream_poll(stream.get()));
    }
    check(ringest_stream_finish(stream.get()));
}

// The checksum of the file, read by so many streams, each on a thread of its own.
static uint32_t checksum(const ringest_file *file, uint64_t streams) {
    auto len = static_cast<uint64_t>(check(ringest_file_size(file)));
    auto memory = make<Mapped>(ringest_mapped_alloc, std::max<uint64_t>(len, 1), nullptr);
    auto buffer = make<Buffer>(ringest_mapped_share, memory.get());
    auto part = len / streams + 1;
    std::vector<std::future<void>> parts;
    for (uint64_t offset = 0; offset < len; offset += part)
        parts.push_back(std::async(std::launch::async, read, file, buffer.get(), offset, std::min(part, len - offset)));
    for (auto &done : parts) done.get(); // or the exception of its thread
    void *data = nullptr;
    uint32_t crc = 0;
    check(ringest_mapped_host_ptr(memory.get(), &data));
    check(ringest_crc32c(0, static_cast<const uint8_t *>(data), len, &crc));
    return crc;
}

int main(int argc, char **argv) try {
    if (argc != 2) throw std::invalid_argument("usage: ingest_cpp FILE");
    auto file = make<File>(ringest_file_open, argv[1], RINGEST_DIRECT_AUTO);
    auto by_four = checksum(file.get(), 4);
    auto by_one = checksum(file.get(), 1);
    std::printf("%" PRId64 " bytes, CRC32C %08" PRIx32 "\n", check(ringest_file_size(file.get())), by_four);
    if (by_four != by_one) throw std::runtime_error("one stream read something else");
} catch (const std::exception &error) {
    std::fprintf(stderr, "ingest_cpp: %s\n", error.what());
    return 1;
}
