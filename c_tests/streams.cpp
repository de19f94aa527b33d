// Four streams on four threads, each with its own ring, into four parts of one buffer, from C++.
#include "check.h"
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t part_bytes = 1 << 20, chunk = 40'001;

template <auto destroy> struct give_up {
    template <class T> void operator()(T *handle) const { CHECK(destroy(handle) == 0); }
};
template <class T, auto destroy> using owned = std::unique_ptr<T, give_up<destroy>>;
using ring = owned<ringest_ring, ringest_ring_destroy>;
using buffer = owned<ringest_buffer, ringest_buffer_release>;
using stream = owned<ringest_stream, ringest_stream_destroy>;

template <class T, class Make> T make(Make call) {
    typename T::pointer made = nullptr;
    CHECK(call(&made) == 0);
    return T(made);
}

void read_part(const ringest_buffer *whole, int fd, std::size_t index, std::uint64_t *word) {
    auto own = make<ring>([](auto **out) { return ringest_ring_create(nullptr, out); });
    auto part = make<buffer>(
        [&](auto **out) { return ringest_buffer_sub_region(whole, index * part_bytes, part_bytes, out); });
    auto reads = make<stream>(
        [&](auto **out) { return ringest_stream_create_u64(own.get(), part.get(), word, nullptr, out); });
    std::int64_t submitted = 0;
    for (std::size_t at = 0; at < part_bytes; at += chunk) {
        const auto len = std::min(chunk, part_bytes - at);
        CALL(submitted, ringest_stream_submit_read, reads.get(), fd, index * part_bytes + at, at, len, at);
        submitted++;
        CALL(DONE, ringest_stream_poll, reads.get());
    }
    CALL(DONE, ringest_stream_wait, reads.get(), UINT32_MAX, -1);
    while (ringest_stream_tail(reads.get()) < submitted) CALL(DONE, ringest_stream_poll, reads.get());
}

} // namespace

int main() {
    ringest_mapped *mapped;
    void *data;
    alignas(64) std::uint64_t words[4] = {9, 9, 9, 9};
    const int fd = data_file(4 * part_bytes);
    CALL(0, ringest_mapped_alloc, 4 * part_bytes, nullptr, &mapped);
    CALL(0, ringest_mapped_host_ptr, mapped, &data);
    {
        auto whole = make<buffer>([&](auto **out) { return ringest_mapped_share(mapped, out); });
        std::vector<std::thread> threads;
        for (std::size_t index = 0; index < 4; index++)
            threads.emplace_back(read_part, whole.get(), fd, index, &words[index]);
        for (auto &thread : threads) thread.join();
    }
    for (const auto word : words) CHECK(word == (part_bytes + chunk - 1) / chunk);
    CHECK(is_pattern(static_cast<const std::uint8_t *>(data), 0, 4 * part_bytes));
    CALL(0, ringest_mapped_free, mapped);
    close(fd);
    return 0;
}
