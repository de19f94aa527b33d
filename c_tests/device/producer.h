// A small producer of an io_queue, written word by word after the protocol, and what the tests of its consumers share.
// Every part of the queue ends at a page that cannot be touched.
#ifndef RINGEST_TEST_PRODUCER_H
#define RINGEST_TEST_PRODUCER_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <initializer_list>

#include "ringest_wire.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            fflush(stderr);                                                         \
            _exit(1);                                                               \
        }                                                                           \
    } while (0)

// The order of the one store that publishes. Relaxed is wrong: a build with it shows that the sanitizer sees that.
#if defined(RINGEST_TEST_RELAXED_SEQ)
constexpr int publish_order = __ATOMIC_RELAXED;
#else
constexpr int publish_order = __ATOMIC_RELEASE;
#endif

// A field of the queue, by its address.
template <class T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}
template <class T>
T get(uint64_t address, int order = __ATOMIC_ACQUIRE) {
    return __atomic_load_n(at<T>(address), order);
}
template <class T>
void put(uint64_t address, T value, int order = __ATOMIC_RELAXED) {
    __atomic_store_n(at<T>(address), value, order);
}

// The same bytes in every run from the same seed.
class xorshift {
public:
    explicit xorshift(uint64_t seed) : state_(seed * 2 + 1) {}
    uint64_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_;
    }
    uint32_t below(uint32_t limit) { return static_cast<uint32_t>((next() >> 32) % limit); }

private:
    uint64_t state_;
};

// Zeroed memory, at a multiple of 128, with a page that faults on either side; its end is the beginning of the latter.
class fenced {
public:
    explicit fenced(size_t bytes) : bytes_(bytes), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
        CHECK(bytes % 128 == 0);
        inner_ = (bytes + page_ - 1) / page_ * page_;
        all_ = static_cast<unsigned char*>(
            mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        CHECK(all_ != MAP_FAILED);
        CHECK(mprotect(all_ + page_, inner_, PROT_READ | PROT_WRITE) == 0);
    }
    ~fenced() { munmap(all_, inner_ + 2 * page_); }
    fenced(const fenced&) = delete;
    fenced& operator=(const fenced&) = delete;

    unsigned char* data() const { return all_ + page_ + inner_ - bytes_; }
    size_t size() const { return bytes_; }
    uint64_t address() const { return reinterpret_cast<uint64_t>(data()); }
    // Nothing may touch it any more.
    void forbid() const { CHECK(mprotect(all_ + page_, inner_, PROT_NONE) == 0); }
    void permit_reads() const { CHECK(mprotect(all_ + page_, inner_, PROT_READ) == 0); }

private:
    size_t bytes_;
    size_t page_;
    size_t inner_;
    unsigned char* all_;
};

constexpr uint64_t round_up(uint64_t value) { return (value + 127) / 128 * 128; }

// The byte of sequence n's payload at i.
inline unsigned char byte_of(uint64_t n, uint64_t i) {
    return static_cast<unsigned char>(((n * 1000003 + i) * UINT64_C(0x9e3779b97f4a7c15)) >> 56);
}

inline bool is_payload(const unsigned char* data, uint32_t bytes, uint64_t n) {
    for (uint32_t i = 0; i < bytes; i++)
        if (data[i] != byte_of(n, i)) return false;
    return true;
}

// An io_queue's memory, its view, and the host's side of the protocol. One thread produces.
class queue {
public:
    queue(ringest_consume_mode mode, uint32_t slot_count, uint32_t consumers = 1, uint64_t slot_bytes = 200,
          uint64_t slot_stride = 256)
        : control(RINGEST_IO_QUEUE_DESCRIPTORS + slot_count * sizeof(ringest_descriptor)),
          credit(round_up(RINGEST_IO_QUEUE_RELEASED + slot_count * 8)),
          device(round_up(pending_at(consumers) + slot_count * 4)),
          slots(slot_count * slot_stride),
          view() {
        view.magic = RINGEST_IO_QUEUE_MAGIC;
        view.version = RINGEST_IO_QUEUE_VERSION;
        view.mode = mode;
        view.slot_count = slot_count;
        view.slot_stride = slot_stride;
        view.slot_bytes = slot_bytes;
        view.epoch = 0x0123456789abcdef;
        view.consumers = consumers;
        view.control = control.address();
        view.credit = credit.address();
        view.device = device.address();
        view.slots = slots.address();
        reset();
    }

    // As when it was new.
    void reset() {
        memset(control.data(), 0, control.size());
        memset(credit.data(), 0, credit.size());
        memset(device.data(), 0, device.size());
        ringest_control_header header = {};
        header.magic = view.magic;
        header.version = view.version;
        header.header_bytes = RINGEST_IO_QUEUE_DESCRIPTORS;
        header.slot_count = view.slot_count;
        header.slot_stride = view.slot_stride;
        header.slot_bytes = view.slot_bytes;
        header.epoch = view.epoch;
        memcpy(control.data(), &header, sizeof header);
        put<uint64_t>(first_bad(), UINT64_MAX);
        next_ = 0;
    }

    static uint64_t pending_at(uint32_t consumers) { return round_up(RINGEST_IO_QUEUE_TICKETS + consumers * 8); }

    uint64_t place(uint64_t n) const { return n & (view.slot_count - 1); }
    uint64_t descriptor(uint64_t n) const { return view.control + RINGEST_IO_QUEUE_DESCRIPTORS + place(n) * 64; }
    uint64_t released(uint64_t n) const { return view.credit + RINGEST_IO_QUEUE_RELEASED + place(n) * 8; }
    uint64_t pending(uint64_t n) const { return view.device + pending_at(view.consumers) + place(n) * 4; }
    uint64_t ticket(uint32_t i) const { return view.device + RINGEST_IO_QUEUE_TICKETS + i * 8; }
    uint64_t claim() const { return view.device; }
    uint64_t handed() const { return view.device + 8; }
    uint64_t tail() const { return view.control + 0x80; }
    uint64_t first_bad() const { return view.control + 0x88; }
    uint64_t state() const { return view.control + 0x100; }
    uint64_t error() const { return view.control + 0x104; }
    uint64_t end_at() const { return view.control + 0x108; }
    int32_t abort_word() const { return get<int32_t>(view.credit); }

    // The sequence that the next publish() makes.
    uint64_t next() const { return next_; }
    // Its slot is free.
    bool has_room() const {
        return next_ < view.slot_count || get<uint64_t>(released(next_)) == next_ + 1 - view.slot_count;
    }

    // The payload of sequence n: its length and offset differ from one to the next.
    uint32_t bytes_of(uint64_t n) const { return static_cast<uint32_t>(n * 37 % (view.slot_bytes + 1)); }
    static uint32_t offset_of(uint64_t n) { return static_cast<uint32_t>(n % 16); }

    // Publishes the next sequence, whole.
    void publish() {
        const uint64_t n = next_;
        unsigned char* data = at<unsigned char>(view.slots + place(n) * view.slot_stride + offset_of(n));
        for (uint32_t i = 0; i < bytes_of(n); i++) data[i] = byte_of(n, i);
        describe(0, bytes_of(n), offset_of(n));
        finish();
    }

    // Publishes the next sequence as failed.
    void poison(int32_t status) {
        if (get<uint64_t>(first_bad()) > next_) put<uint64_t>(first_bad(), next_);
        describe(status, 0, 0);
        finish();
    }

    // The next sequence's descriptor, all but seq.
    void describe(int32_t status, uint32_t bytes, uint32_t data_offset) {
        const uint64_t n = next_;
        const uint64_t words = descriptor(n);
        CHECK(has_room());
        put<int32_t>(words + 8, status);
        put<uint32_t>(words + 12, bytes);
        put<uint64_t>(words + 16, n * 3);
        put<uint64_t>(words + 24, n * 4096 + data_offset);
        put<uint32_t>(words + 32, data_offset);
        put<uint32_t>(words + 36, static_cast<uint32_t>(n) ^ 0xc3c3c3c3u);
        put<uint16_t>(words + 40, 5);
        put<uint16_t>(words + 42, RINGEST_DESCRIPTOR_CRC32C);
        put<uint32_t>(words + 44, static_cast<uint32_t>(n + 7));
    }

    // seq, then the tail.
    void finish() {
        put<uint64_t>(descriptor(next_), next_ + 1, publish_order);
        next_++;
        put<uint64_t>(tail(), next_, publish_order);
    }

    void end() {
        put<uint64_t>(end_at(), next_);
        put<uint32_t>(state(), RINGEST_STATE_END, __ATOMIC_RELEASE);
    }

    void abort(int32_t why) {
        put<int32_t>(error(), why);
        put<uint32_t>(state(), RINGEST_STATE_ABORTED, __ATOMIC_RELEASE);
    }

    fenced control, credit, device, slots;
    ringest_io_queue_view view;

private:
    uint64_t next_ = 0;
};

#endif
