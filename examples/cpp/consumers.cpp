// Loads a file into memory the way a kernel would: a driver fills the slots of an io_queue, and four threads, which know
// nothing but its view, claim slots by the device header and copy each payload to its place.
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <ringest.h>
#include <ringest_device.cuh>
#include <stdexcept>
#include <vector>

namespace device = ringest::device;

// Every handle is given back by the call that belongs to it.
template <auto Release> struct Releaser {
    template <class T> void operator()(T *handle) const { Release(handle); }
};
// The view is lent out; when this is called, the threads that have it have ended.
static void destroy_queue(ringest_io_queue *queue) {
    ringest_io_queue_consumers_stopped(queue);
    ringest_io_queue_destroy(queue);
}
using File = std::unique_ptr<ringest_file, Releaser<ringest_file_close>>;
using Queue = std::unique_ptr<ringest_io_queue, Releaser<destroy_queue>>;
using Ring = std::unique_ptr<ringest_ring, Releaser<ringest_ring_destroy>>;
using Driver = std::unique_ptr<ringest_driver, Releaser<ringest_driver_destroy>>;

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

static uint32_t crc32c(const void *data, size_t len) {
    uint32_t crc = 0;
    check(ringest_crc32c(0, data, len, &crc));
    return crc;
}

// A consumer: pops until the end, and returns the bytes it copied. On a GPU this is the kernel, with a warp or a block in
// the place of thread_group.
static uint64_t consume(ringest_io_queue_view view, uint32_t index, unsigned char *memory) {
    device::consumer<device::thread_group> queue(view, index);
    uint64_t bytes = 0;
    for (device::slot slot;;) {
        auto outcome = queue.wait_pop(slot, UINT64_MAX);
        // Why the other side gave up is for its thread to tell, and so is why a read failed.
        if (outcome != RINGEST_OUTCOME_OK && outcome != RINGEST_OUTCOME_POISON) return bytes;
        if (outcome == RINGEST_OUTCOME_OK) {
            std::memcpy(memory + slot.file_offset, slot.data, slot.bytes);
            if (crc32c(memory + slot.file_offset, slot.bytes) != slot.crc32c) {
                device::abort(view, -EIO);
                throw std::runtime_error("a payload is not what the driver read");
            }
            bytes += slot.bytes;
        }
        queue.release(slot);
    }
}

// The producer's side: reads of the whole file, as far as there are slots, until all have ended.
static void drive(ringest_driver *driver, const ringest_file *file, uint64_t len) {
    for (uint64_t offset = 0; offset < len;) {
        auto accepted = ringest_driver_submit_file(driver, file, offset, len - offset, 0);
        if (accepted != -EAGAIN) {
            offset += check(accepted);
            continue;
        }
        check(ringest_driver_wait(driver, 1, -1));
        check(ringest_driver_poll(driver)); // or the error of a read
    }
    check(ringest_driver_finish(driver));
    check(ringest_driver_drain(driver, -1));
    while (check(ringest_driver_poll(driver)) > 0) {
    }
}

// The file in memory, by so many consumers.
static std::vector<unsigned char> load(const ringest_file *file, uint32_t consumers) {
    std::vector<unsigned char> memory(check(ringest_file_size(file)));
    ringest_io_queue_options cut{};
    cut.size = sizeof cut;
    cut.slots = 16;
    cut.slot_bytes = 256 << 10;
    cut.mode = RINGEST_CONSUME_MODE_CLAIMED;
    cut.consumers = consumers;
    auto queue = make<Queue>(ringest_io_queue_create, &cut);
    ringest_io_queue_view view{};
    check(ringest_io_queue_host_view(queue.get(), &view)); // for a kernel: ringest_io_queue_device_view

    auto ring = make<Ring>(ringest_ring_create, nullptr);
    ringest_driver_options options{};
    options.size = sizeof options;
    options.flags = RINGEST_DRIVER_CRC32C;
    options.queue_limit = 16; // these wait for a slot in the driver, which naps meanwhile
    auto driver = make<Driver>(ringest_driver_create, ring.get(), queue.get(), &options);

    std::vector<std::future<uint64_t>> parts;
    std::exception_ptr failure;
    try {
        for (uint32_t index = 0; index < consumers; index++)
            parts.push_back(std::async(std::launch::async, consume, view, index, memory.data()));
        drive(driver.get(), file, memory.size());
    } catch (...) {
        failure = std::current_exception();
    }
    driver.reset(); // unless all went well, consumers get ABORTED now
    uint64_t bytes = 0;
    for (auto &part : parts) part.wait();
    for (auto &part : parts) bytes += part.get(); // or why it gave up, which comes before what that did to the driver
    if (failure) std::rethrow_exception(failure);
    if (bytes != memory.size()) throw std::runtime_error("consumers missed bytes");
    return memory;
}

int main(int argc, char **argv) try {
    if (argc != 2) throw std::invalid_argument("usage: consumers FILE");
    auto file = make<File>(ringest_file_open, argv[1], RINGEST_DIRECT_AUTO);
    auto memory = load(file.get(), 4);
    std::printf("%zu bytes, CRC32C %08" PRIx32 "\n", memory.size(), crc32c(memory.data(), memory.size()));
} catch (const std::exception &error) {
    std::fprintf(stderr, "consumers: %s\n", error.what());
    return 1;
}
