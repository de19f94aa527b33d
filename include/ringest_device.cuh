// Consumers of an io_queue and of tail lines: for CUDA kernels (nvcc, clang, NVRTC; sm_70 and newer) and, as plain
// C++17, for host threads, which run the very same code.
//
//   __global__ void kernel(ringest_io_queue_view view) {                 // the view of this device, by value
//       using namespace ringest::device;
//       __shared__ block_group::storage storage;
//       consumer<block_group> queue(view, blockIdx.x, block_group(storage));
//       for (slot item;;) {
//           ringest_outcome outcome = queue.wait_pop(item, 1000000000);  // at most a second
//           if (outcome == RINGEST_OUTCOME_TIMEOUT) continue;
//           if (outcome != RINGEST_OUTCOME_OK && outcome != RINGEST_OUTCOME_POISON) break;
//           if (outcome == RINGEST_OUTCOME_OK) use(item.data, item.bytes);
//           queue.release(item);
//       }
//   }
//
// The contract
//
// Groups. A consumer belongs to a group of threads: one thread, a warp, a block, or what the caller brings (see
// "Groups"). Every thread of the group has its own object, made with the same arguments, and all of them make the same
// calls in the same order; all get the same results. One of them, the leader, touches the queue's words.
//
// Slots. After OK, `data` and the `bytes` behind it are the payload, whole, and every thread of the group may read them
// with ordinary loads, never with ld.global.nc or __ldg: those may give what an earlier payload left in a cache.
// Threads that hand the slot to the asynchronous proxy (TMA, cp.async.bulk) call acquire_for_tma() first, each of them
// that issues a copy. After POISON the slot holds nothing to look at; `status` says why. Both have to be released.
// Several slots may be held, and released in any order. Before release(), a thread's loads of the slot have given their
// values and its bulk copies have completed; afterwards the next payload may come at any time.
//
// Order. The leader polls with relaxed loads of system scope. When the sequence is there, one acquire-release fence of
// system scope stands between that load and everything read afterwards, the descriptor first; the group's broadcast
// takes this to the other threads. release() is the reverse: barrier, then the leader's release store.
//
// Trust. Addresses and sizes come from the view, which is checked once, never from shared memory. A slot handed out
// lies within the slots whatever the shared words hold. Words that make no sense end in ABORTED with -EPROTO, for all
// consumers; a view that makes no sense in ABORTED with -EINVAL, without a look at any memory; another queue's memory
// in ABORTED with -EPROTO or -ESTALE, without a store to it.
//
// Modes, fixed in the view. single: one consumer takes every sequence. partitioned: consumer i of C takes the sequences
// n with n mod C = i. claimed: each pop takes a ticket, the next sequence nobody has; it is kept until it was popped,
// and a consumer that stops before gives it back with hand_back(), lest that sequence be lost. broadcast: each consumer
// takes every sequence, and the last to release a slot gives it back. How far a consumer came is kept in the device
// block: a kernel launched anew goes on there.
//
// Host programs under ThreadSanitizer, which does not understand fences, define RINGEST_DEVICE_ACQUIRE_LOADS: polls are
// acquire loads then.

#ifndef RINGEST_DEVICE_CUH
#define RINGEST_DEVICE_CUH

#include "ringest_wire.h"

#if !defined(__CUDACC_RTC__)
#include <sched.h>
#include <time.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(__CUDA__)
#define RINGEST_DEVICE_FN __host__ __device__ inline
#else
#define RINGEST_DEVICE_FN inline
#endif

// A group's functions may be for the device alone, or for the host alone: only what is called has to fit.
#if defined(__CUDACC__) && !defined(__clang__)
#define RINGEST_DEVICE_ANY_GROUP _Pragma("nv_exec_check_disable")
#else
#define RINGEST_DEVICE_ANY_GROUP
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#error "ringest_device.cuh needs sm_70 or newer: its memory orders do not exist before"
#endif

namespace ringest {
namespace device {

// ---------------------------------------------------------------------------------------------------------------------
// Types

// A popped sequence.
struct slot {
    // Which one, from 0.
    uint64_t sequence;
    // The payload.
    const unsigned char* data;
    // Its length.
    uint32_t bytes;
    // 0, or after POISON -errno.
    int32_t status;
    // The submitter's value.
    uint64_t tag;
    // Where in the file the payload begins.
    uint64_t file_offset;
    // Where in the slot the payload begins; the same as file_offset modulo 16.
    uint32_t data_offset;
    // CRC32C of the payload, where flags has RINGEST_DESCRIPTOR_CRC32C.
    uint32_t crc32c;
    // enum ringest_read_path: how it was read.
    uint16_t path;
    // RINGEST_DESCRIPTOR_* bits.
    uint16_t flags;
    // NVMe status of a failed passthrough command; 0 otherwise.
    uint32_t nvme_status;
};

// Groups
//
// A group is a copyable object with
//
//   bool leader() const         true in exactly one of its threads, always the same
//   void sync() const           a barrier: what any thread did before comes before what any thread does after
//   T broadcast(T value) const  the leader's value, in every thread; what the leader did before comes before what any
//                               thread does after. T is trivially copyable, of at most 64 bytes.
//
// and all of its threads make the same calls.

// A thread by itself.
struct thread_group {
    RINGEST_DEVICE_FN bool leader() const { return true; }
    RINGEST_DEVICE_FN void sync() const {}
    template <class T>
    RINGEST_DEVICE_FN T broadcast(T value) const {
        return value;
    }
};

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(__CUDA__)

// The threads of a warp, or those of them in `lanes`.
class warp_group {
public:
    __device__ explicit warp_group(unsigned lanes = 0xffffffffu) : lanes_(lanes) {}
    __device__ bool leader() const;
    __device__ void sync() const;
    template <class T>
    __device__ T broadcast(T value) const;

private:
    __device__ int first() const { return __ffs(static_cast<int>(lanes_)) - 1; }

    unsigned lanes_;
};

// All threads of a block, with shared memory to pass values through. Nobody else uses that memory meanwhile.
class block_group {
public:
    struct storage {
        alignas(16) unsigned char bytes[64];
    };

    __device__ explicit block_group(storage& shared) : shared_(&shared) {}
    __device__ bool leader() const { return threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0; }
    __device__ void sync() const { __syncthreads(); }
    template <class T>
    __device__ T broadcast(T value) const;

private:
    storage* shared_;
};

#endif

// For consumer<Group, Mode>: the mode is whatever the view says.
constexpr int any_mode = -1;

// One of the view's consumers.
//
// Mode: any_mode, or a RINGEST_CONSUME_MODE_* value, for code without the other modes; a view with another mode is bad.
template <class Group = thread_group, int Mode = any_mode>
class consumer {
public:
    // index: which of the view's consumers, 0 <= index < consumers; no two at a time have the same. Ignored in claimed
    // mode. A view that cannot be consumed shows in the first pop.
    RINGEST_DEVICE_FN consumer(const ringest_io_queue_view& view, uint32_t index, Group group = Group());
    consumer(const consumer&) = delete;
    consumer& operator=(const consumer&) = delete;

    // The next sequence, if it is there: OK, END, ABORTED, POISON or TIMEOUT. `item` is set by OK and POISON alone.
    RINGEST_DEVICE_FN ringest_outcome try_pop(slot& item);

    // The next sequence, within timeout_ns from now; 0: one look, UINT64_MAX: for ever.
    RINGEST_DEVICE_FN ringest_outcome wait_pop(slot& item, uint64_t timeout_ns);

    // Gives a popped slot back.
    RINGEST_DEVICE_FN void release(const slot& item);

    // Claimed mode: gives a ticket back, for any consumer to take with its next pop, also one that has come to the END
    // before; the last to leave should hand nothing back that is still to come. False: none is held, or there is no
    // place for it, as more consumers than the view says hold one; then it is still held.
    RINGEST_DEVICE_FN bool hand_back();

    // After ABORTED: -errno. 0 before.
    RINGEST_DEVICE_FN int32_t error() const { return error_; }

    // The sequence that is waited for; UINT64_MAX in claimed mode while no ticket is held.
    RINGEST_DEVICE_FN uint64_t next() const { return is_claimed() && !held_ ? UINT64_MAX : next_; }

private:
    // What the leader tells the others.
    struct result {
        slot item;  // its sequence always, the rest after OK and POISON
        ringest_outcome outcome;
        int32_t error;
    };

    static_assert(Mode >= any_mode && Mode <= RINGEST_CONSUME_MODE_BROADCAST, "any_mode or a RINGEST_CONSUME_MODE_*");
    static_assert(sizeof(result) <= 64, "what a group can broadcast");

    RINGEST_DEVICE_FN bool is(int mode) const { return Mode == any_mode ? mode_ == mode : Mode == mode; }
    RINGEST_DEVICE_FN bool is_claimed() const { return is(RINGEST_CONSUME_MODE_CLAIMED); }
    RINGEST_DEVICE_FN uint64_t ticket_at(uint32_t place) const;

    RINGEST_DEVICE_FN ringest_outcome settle(const result& told, slot& item);
    RINGEST_DEVICE_FN void poll(result& told);
    RINGEST_DEVICE_FN ringest_outcome look(slot& item);
    RINGEST_DEVICE_FN ringest_outcome read(uint64_t descriptor, uint32_t place, slot& item);
    RINGEST_DEVICE_FN ringest_outcome give_up(int32_t error);
    RINGEST_DEVICE_FN ringest_outcome corrupt();
    RINGEST_DEVICE_FN void take_ticket();
    RINGEST_DEVICE_FN bool swap_for_lower_ticket();

    Group group_;
    uint64_t control_;
    uint64_t credit_;
    uint64_t device_;
    uint64_t slots_;
    uint64_t slot_stride_;
    uint64_t slot_bytes_;
    uint64_t epoch_;
    uint64_t next_;    // the sequence waited for
    uint64_t popped_;  // how many, except in claimed mode
    uint32_t slot_count_;
    uint32_t consumers_;
    uint32_t index_;
    int32_t error_;
    int mode_;
    bool held_;         // claimed mode: next_ is a ticket
    bool untouchable_;  // bad view or another queue's memory: no store, ever
};

// Waits until sequences (submissions) 0 to n are there, at most timeout_ns; 0: one look, UINT64_MAX: for ever.
//
// OK: they are, all of them. POISON: one of them failed. END: there will be no n. ABORTED: one side gave up, or the
// words make no sense, and *error, where given, is -errno. A stream may still withdraw a failure, by a resubmission.
template <class Group = thread_group>
RINGEST_DEVICE_FN ringest_outcome wait_tail(const ringest_io_queue_view& view, uint64_t n, uint64_t timeout_ns,
                                            Group group = Group(), int32_t* error = nullptr);
template <class Group = thread_group>
RINGEST_DEVICE_FN ringest_outcome wait_tail(const ringest_tail_line_words* line, uint64_t n, uint64_t timeout_ns,
                                            Group group = Group(), int32_t* error = nullptr);

// Ends the queue for its producer and all of its consumers, with -errno; the first error stays. Does nothing if the
// view is bad or another queue's.
RINGEST_DEVICE_FN void abort(const ringest_io_queue_view& view, int32_t error);

// Between a pop and this thread's bulk copies (TMA, cp.async.bulk) from its slot: puts them after the pop.
RINGEST_DEVICE_FN void acquire_for_tma();

// ---------------------------------------------------------------------------------------------------------------------
// Words: every access to shared memory, by address, always atomic

namespace detail {

static_assert(sizeof(void*) == 8, "addresses are of 64 bits");

constexpr int32_t invalid = -22;   // -EINVAL
constexpr int32_t protocol = -71;  // -EPROTO
constexpr int32_t stale = -116;    // -ESTALE

// Offsets, in numbers because NVRTC has no offsetof that is a constant.
constexpr uint64_t header_stride_at = 16;
constexpr uint64_t header_epoch_at = 32;
constexpr uint64_t tail_at = 0x80;
constexpr uint64_t first_bad_at = 0x88;
constexpr uint64_t state_at = 0x100;
constexpr uint64_t error_at = 0x104;
constexpr uint64_t end_at = 0x108;
constexpr uint64_t line_tail_at = 0;
constexpr uint64_t line_first_bad_at = 8;
constexpr uint64_t line_state_at = 16;
constexpr uint64_t line_error_at = 20;
constexpr uint64_t line_end_at = 24;
constexpr uint64_t handed_at = 8;

#if !defined(__CUDACC_RTC__)
static_assert(header_stride_at == __builtin_offsetof(ringest_control_header, slot_stride), "header.slot_stride");
static_assert(header_epoch_at == __builtin_offsetof(ringest_control_header, epoch), "header.epoch");
static_assert(tail_at == __builtin_offsetof(ringest_control_block, tail), "tail");
static_assert(first_bad_at == __builtin_offsetof(ringest_control_block, first_bad), "first_bad");
static_assert(state_at == __builtin_offsetof(ringest_control_block, state), "state");
static_assert(error_at == __builtin_offsetof(ringest_control_block, error), "error");
static_assert(end_at == __builtin_offsetof(ringest_control_block, end), "end");
static_assert(line_tail_at == __builtin_offsetof(ringest_tail_line_words, tail), "line.tail");
static_assert(line_first_bad_at == __builtin_offsetof(ringest_tail_line_words, first_bad), "line.first_bad");
static_assert(line_state_at == __builtin_offsetof(ringest_tail_line_words, state), "line.state");
static_assert(line_error_at == __builtin_offsetof(ringest_tail_line_words, error), "line.error");
static_assert(line_end_at == __builtin_offsetof(ringest_tail_line_words, end), "line.end");
#endif

// Sequences are less than this.
constexpr uint64_t sequence_limit = uint64_t{1} << 63;

#if defined(__CUDA_ARCH__)

RINGEST_DEVICE_FN uint32_t load_u32(uint64_t address) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

RINGEST_DEVICE_FN uint64_t load_u64(uint64_t address) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// Two words at a multiple of 16, by one request; each is atomic, the pair need not be.
RINGEST_DEVICE_FN void load_pair(uint64_t address, uint64_t& first, uint64_t& second) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
}

// A load that acquires once acquire() follows it.
RINGEST_DEVICE_FN uint32_t poll_u32(uint64_t address) { return load_u32(address); }
RINGEST_DEVICE_FN uint64_t poll_u64(uint64_t address) { return load_u64(address); }
RINGEST_DEVICE_FN void acquire() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

RINGEST_DEVICE_FN void store_u32(uint64_t address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

RINGEST_DEVICE_FN void store_u64(uint64_t address, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

RINGEST_DEVICE_FN void release_u64(uint64_t address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

RINGEST_DEVICE_FN void add_u32(uint64_t address, uint32_t value) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

RINGEST_DEVICE_FN uint64_t fetch_add_u64(uint64_t address, uint64_t value) {
    uint64_t before;
    asm volatile("atom.relaxed.sys.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(address), "l"(value) : "memory");
    return before;
}

// Acquires and releases.
RINGEST_DEVICE_FN uint32_t fetch_sub_ordered_u32(uint64_t address, uint32_t value) {
    uint32_t before;
    asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(address), "r"(0u - value)
                 : "memory");
    return before;
}

RINGEST_DEVICE_FN bool replace_u32(uint64_t address, uint32_t expected, uint32_t value) {
    uint32_t before;
    asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(value)
                 : "memory");
    return before == expected;
}

RINGEST_DEVICE_FN bool replace_u64(uint64_t address, uint64_t expected, uint64_t value) {
    uint64_t before;
    asm volatile("atom.relaxed.sys.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(address), "l"(expected), "l"(value)
                 : "memory");
    return before == expected;
}

#else

RINGEST_DEVICE_FN uint32_t* word_u32(uint64_t address) { return reinterpret_cast<uint32_t*>(address); }
RINGEST_DEVICE_FN uint64_t* word_u64(uint64_t address) { return reinterpret_cast<uint64_t*>(address); }

RINGEST_DEVICE_FN uint32_t load_u32(uint64_t address) { return __atomic_load_n(word_u32(address), __ATOMIC_RELAXED); }
RINGEST_DEVICE_FN uint64_t load_u64(uint64_t address) { return __atomic_load_n(word_u64(address), __ATOMIC_RELAXED); }

RINGEST_DEVICE_FN void load_pair(uint64_t address, uint64_t& first, uint64_t& second) {
    first = load_u64(address);
    second = load_u64(address + 8);
}

#if defined(RINGEST_DEVICE_ACQUIRE_LOADS)
RINGEST_DEVICE_FN uint32_t poll_u32(uint64_t address) { return __atomic_load_n(word_u32(address), __ATOMIC_ACQUIRE); }
RINGEST_DEVICE_FN uint64_t poll_u64(uint64_t address) { return __atomic_load_n(word_u64(address), __ATOMIC_ACQUIRE); }
RINGEST_DEVICE_FN void acquire() {}
#else
RINGEST_DEVICE_FN uint32_t poll_u32(uint64_t address) { return load_u32(address); }
RINGEST_DEVICE_FN uint64_t poll_u64(uint64_t address) { return load_u64(address); }
RINGEST_DEVICE_FN void acquire() { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
#endif

RINGEST_DEVICE_FN void store_u32(uint64_t address, uint32_t value) {
    __atomic_store_n(word_u32(address), value, __ATOMIC_RELAXED);
}

RINGEST_DEVICE_FN void store_u64(uint64_t address, uint64_t value) {
    __atomic_store_n(word_u64(address), value, __ATOMIC_RELAXED);
}

RINGEST_DEVICE_FN void release_u64(uint64_t address, uint64_t value) {
    __atomic_store_n(word_u64(address), value, __ATOMIC_RELEASE);
}

RINGEST_DEVICE_FN void add_u32(uint64_t address, uint32_t value) {
    __atomic_fetch_add(word_u32(address), value, __ATOMIC_RELAXED);
}

RINGEST_DEVICE_FN uint64_t fetch_add_u64(uint64_t address, uint64_t value) {
    return __atomic_fetch_add(word_u64(address), value, __ATOMIC_RELAXED);
}

RINGEST_DEVICE_FN uint32_t fetch_sub_ordered_u32(uint64_t address, uint32_t value) {
    return __atomic_fetch_sub(word_u32(address), value, __ATOMIC_ACQ_REL);
}

RINGEST_DEVICE_FN bool replace_u32(uint64_t address, uint32_t expected, uint32_t value) {
    return __atomic_compare_exchange_n(word_u32(address), &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

RINGEST_DEVICE_FN bool replace_u64(uint64_t address, uint64_t expected, uint64_t value) {
    return __atomic_compare_exchange_n(word_u64(address), &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#endif

RINGEST_DEVICE_FN uint32_t low(uint64_t word) { return static_cast<uint32_t>(word); }
RINGEST_DEVICE_FN uint32_t high(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

// What an error word says once it has to say something.
RINGEST_DEVICE_FN int32_t to_error(uint32_t word) {
    const int32_t error = static_cast<int32_t>(word);
    return error < 0 && error >= -4095 ? error : protocol;
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting

// When to look again, and when to stop. Shared words wake nobody: a wait is a poll, with pauses that grow, so that many
// waiting groups leave the bus to the payloads.
class patience {
public:
    RINGEST_DEVICE_FN explicit patience(uint64_t timeout_ns) : timeout_ns_(timeout_ns), start_(0), rounds_(0) {}

    // Pauses; false once the time is over.
    RINGEST_DEVICE_FN bool lasts() {
        if (timeout_ns_ == 0) return false;
        const uint64_t now = clock();
        if (rounds_ == 0) start_ = now;
        // Clocks of some devices step back by a tick.
        const uint64_t gone = now > start_ ? now - start_ : 0;
        if (gone >= timeout_ns_) return false;
        pause(timeout_ns_ - gone);
        if (rounds_ < UINT32_MAX) rounds_++;
        return true;
    }

private:
#if defined(__CUDA_ARCH__)
    RINGEST_DEVICE_FN static uint64_t clock() {
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
        return now;
    }

    // A look takes about a microsecond over PCIe; half of that is the most that is added.
    RINGEST_DEVICE_FN void pause(uint64_t) const {
        if (rounds_ < 16) return;
        __nanosleep(rounds_ < 64 ? 64 : 512);
    }
#else
    RINGEST_DEVICE_FN static uint64_t clock() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
    }

    RINGEST_DEVICE_FN void pause(uint64_t left) const {
        if (rounds_ < 256) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        } else if (rounds_ < 512) {
            sched_yield();
        } else {
            const timespec nap = {0, left < 50000 ? static_cast<long>(left) : 50000};
            nanosleep(&nap, nullptr);
        }
    }
#endif

    uint64_t timeout_ns_;
    uint64_t start_;
    uint32_t rounds_;
};

// ---------------------------------------------------------------------------------------------------------------------
// What pops and waits for a tail have in common

RINGEST_DEVICE_FN bool can_be_consumed(const ringest_io_queue_view& view) {
    const uint64_t addresses = view.control | view.credit | view.device | view.slots;
    return view.magic == RINGEST_IO_QUEUE_MAGIC && view.version == RINGEST_IO_QUEUE_VERSION &&
           view.mode <= RINGEST_CONSUME_MODE_BROADCAST && view.slot_count >= RINGEST_IO_QUEUE_MIN_SLOTS &&
           view.slot_count <= RINGEST_IO_QUEUE_MAX_SLOTS && (view.slot_count & (view.slot_count - 1)) == 0 &&
           view.consumers >= 1 && view.consumers <= RINGEST_IO_QUEUE_MAX_CONSUMERS &&
           (view.consumers == 1 || view.mode != RINGEST_CONSUME_MODE_SINGLE) && view.slot_bytes <= view.slot_stride &&
           view.control != 0 && view.credit != 0 && view.device != 0 && view.slots != 0 &&
           addresses % RINGEST_IO_QUEUE_ALIGNMENT == 0;
}

RINGEST_DEVICE_FN uint64_t epoch_in(uint64_t control) {
    return load_u64(control + header_epoch_at);
}

// Where `pending` begins in a device block: after the tickets, aligned.
RINGEST_DEVICE_FN uint64_t pending_at(uint32_t consumers) {
    const uint64_t end = RINGEST_IO_QUEUE_TICKETS + uint64_t{consumers} * 8;
    return (end + RINGEST_IO_QUEUE_ALIGNMENT - 1) / RINGEST_IO_QUEUE_ALIGNMENT * RINGEST_IO_QUEUE_ALIGNMENT;
}

// 0, or why the control block is not this view's.
RINGEST_DEVICE_FN int32_t examine_header(const ringest_io_queue_view& view) {
    uint64_t identity, cut, stride, bytes;
    load_pair(view.control, identity, cut);
    load_pair(view.control + header_stride_at, stride, bytes);
    const uint64_t epoch = epoch_in(view.control);
    if (low(identity) != view.magic || high(identity) != view.version || high(cut) != view.slot_count ||
        stride != view.slot_stride || bytes != view.slot_bytes)
        return protocol;
    return epoch == view.epoch ? 0 : stale;
}

// Where to look when a sequence is not there. abort is 0 for a stream, which has no such word.
struct ends {
    uint64_t abort;
    uint64_t state;
    uint64_t error;
    uint64_t end;
};

// ABORTED, with its error, or OK: not aborted.
RINGEST_DEVICE_FN ringest_outcome aborted(const ends& at, uint32_t abort_word, uint32_t state, int32_t& error) {
    if (abort_word != 0) {
        error = to_error(abort_word);
        return RINGEST_OUTCOME_ABORTED;
    }
    if (state == RINGEST_STATE_ABORTED) {
        acquire();
        error = to_error(load_u32(at.error));
        return RINGEST_OUTCOME_ABORTED;
    }
    return RINGEST_OUTCOME_OK;
}

// END, TIMEOUT, or ABORTED for a state that cannot be.
RINGEST_DEVICE_FN ringest_outcome not_there(const ends& at, uint32_t state, uint64_t sequence) {
    if (state == RINGEST_STATE_OPEN) return RINGEST_OUTCOME_TIMEOUT;
    if (state != RINGEST_STATE_END) return RINGEST_OUTCOME_ABORTED;
    acquire();
    return sequence >= load_u64(at.end) ? RINGEST_OUTCOME_END : RINGEST_OUTCOME_TIMEOUT;
}

RINGEST_DEVICE_FN ends ends_of(uint64_t control, uint64_t credit) {
    return {credit, control + state_at, control + error_at, control + end_at};
}

// First error wins. Where a device cannot do atomics on the host's memory, one of the errors does.
RINGEST_DEVICE_FN void store_abort(uint64_t credit, int32_t error) {
    replace_u32(credit, 0, static_cast<uint32_t>(error));
}

struct tail_result {
    ringest_outcome outcome;
    int32_t error;
};

// One look at a tail. A state that cannot be is ABORTED with error 0.
RINGEST_DEVICE_FN tail_result look_at_tail(uint64_t tail_address, uint64_t first_bad, const ends& at, uint64_t n) {
    const uint64_t tail = poll_u64(tail_address);
    const uint32_t abort_word = at.abort != 0 ? load_u32(at.abort) : 0;
    const uint32_t state = poll_u32(at.state);
    tail_result found = {RINGEST_OUTCOME_OK, 0};
    if (tail > n) {
        acquire();
        if (load_u64(first_bad) <= n) found.outcome = RINGEST_OUTCOME_POISON;
        return found;
    }
    found.outcome = aborted(at, abort_word, state, found.error);
    if (found.outcome != RINGEST_OUTCOME_OK) return found;
    // From the first failure on it is POISON, beyond the end too.
    found.outcome = load_u64(first_bad) <= n ? RINGEST_OUTCOME_POISON : not_there(at, state, n);
    return found;
}

// The leader's part of wait_tail.
RINGEST_DEVICE_FN tail_result wait_for_tail(const ringest_io_queue_view& view, uint64_t n, uint64_t timeout_ns) {
    if (!can_be_consumed(view)) return {RINGEST_OUTCOME_ABORTED, invalid};
    const ends at = ends_of(view.control, view.credit);
    patience until(timeout_ns);
    // Compared after the first look, so that a device loads them together.
    const uint64_t epoch = epoch_in(view.control);
    for (;;) {
        tail_result found = look_at_tail(view.control + tail_at, view.control + first_bad_at, at, n);
        if (epoch != view.epoch) return {RINGEST_OUTCOME_ABORTED, stale};
        if (found.outcome == RINGEST_OUTCOME_ABORTED && found.error == 0) {
            store_abort(view.credit, protocol);
            found.error = protocol;
        }
        if (found.outcome != RINGEST_OUTCOME_TIMEOUT || !until.lasts()) return found;
    }
}

RINGEST_DEVICE_FN tail_result wait_for_tail(const ringest_tail_line_words* line, uint64_t n, uint64_t timeout_ns) {
    const uint64_t words = reinterpret_cast<uint64_t>(line);
    const ends at = {0, words + line_state_at, words + line_error_at, words + line_end_at};
    patience until(timeout_ns);
    for (;;) {
        tail_result found = look_at_tail(words + line_tail_at, words + line_first_bad_at, at, n);
        if (found.outcome == RINGEST_OUTCOME_ABORTED && found.error == 0) found.error = protocol;
        if (found.outcome != RINGEST_OUTCOME_TIMEOUT || !until.lasts()) return found;
    }
}

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------------------
// Groups

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(__CUDA__)

__device__ inline bool warp_group::leader() const {
    unsigned lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return static_cast<int>(lane) == first();
}

__device__ inline void warp_group::sync() const { __syncwarp(lanes_); }

template <class T>
__device__ inline T warp_group::broadcast(T value) const {
    static_assert(__is_trivially_copyable(T) && sizeof(T) <= 64, "at most 64 bytes, copied as bytes");
    unsigned words[(sizeof(T) + 3) / 4] = {};
    memcpy(words, &value, sizeof(T));
    for (unsigned& word : words) word = __shfl_sync(lanes_, word, first());
    memcpy(&value, words, sizeof(T));
    // A shuffle orders no memory accesses; this does.
    __syncwarp(lanes_);
    return value;
}

template <class T>
__device__ inline T block_group::broadcast(T value) const {
    static_assert(__is_trivially_copyable(T) && sizeof(T) <= sizeof(storage), "at most 64 bytes, copied as bytes");
    if (leader()) memcpy(shared_->bytes, &value, sizeof(T));
    __syncthreads();
    memcpy(&value, shared_->bytes, sizeof(T));
    // Until all have read it the leader must not write the next.
    __syncthreads();
    return value;
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Consumer

RINGEST_DEVICE_ANY_GROUP
template <class Group, int Mode>
RINGEST_DEVICE_FN consumer<Group, Mode>::consumer(const ringest_io_queue_view& view, uint32_t index, Group group)
    : group_(group),
      control_(view.control),
      credit_(view.credit),
      device_(view.device),
      slots_(view.slots),
      slot_stride_(view.slot_stride),
      slot_bytes_(view.slot_bytes),
      epoch_(view.epoch),
      next_(0),
      popped_(0),
      slot_count_(view.slot_count),
      consumers_(view.consumers),
      index_(index),
      error_(0),
      mode_(static_cast<int>(view.mode)),
      held_(false),
      untouchable_(false) {
    struct start {
        uint64_t popped;
        int32_t error;
    } found = {0, 0};
    if (!detail::can_be_consumed(view) || (Mode != any_mode && mode_ != Mode) ||
        (!is_claimed() && index >= view.consumers))
        found.error = detail::invalid;
    if (found.error == 0) {
        if (group_.leader()) {
            found.error = detail::examine_header(view);
            if (found.error == 0 && !is_claimed()) found.popped = ticket_at(index);
        }
        found = group_.broadcast(found);
    }
    error_ = found.error;
    untouchable_ = found.error != 0;
    popped_ = found.popped;
    next_ = popped_;
    if (is(RINGEST_CONSUME_MODE_PARTITIONED) && found.error == 0)
        next_ = popped_ <= detail::sequence_limit / consumers_ ? index + popped_ * consumers_ : detail::sequence_limit;
}

RINGEST_DEVICE_ANY_GROUP
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::try_pop(slot& item) {
    return wait_pop(item, 0);
}

RINGEST_DEVICE_ANY_GROUP
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::wait_pop(slot& item, uint64_t timeout_ns) {
    if (error_ != 0) return RINGEST_OUTCOME_ABORTED;
    result told = {};
    if (group_.leader()) {
        detail::patience until(timeout_ns);
        do {
            poll(told);
        } while (told.outcome == RINGEST_OUTCOME_TIMEOUT && until.lasts());
    }
    return settle(group_.broadcast(told), item);
}

RINGEST_DEVICE_ANY_GROUP
template <class Group, int Mode>
RINGEST_DEVICE_FN void consumer<Group, Mode>::release(const slot& item) {
    group_.sync();
    if (untouchable_ || !group_.leader()) return;
    const uint64_t place = item.sequence & (slot_count_ - 1);
    if (is(RINGEST_CONSUME_MODE_BROADCAST)) {
        // Counts down from 0, so that zeroed memory is a start.
        const uint64_t pending = device_ + detail::pending_at(consumers_) + place * 4;
        if (detail::fetch_sub_ordered_u32(pending, 1) != 1 - consumers_) return;
        detail::store_u32(pending, 0);
    }
    detail::release_u64(credit_ + RINGEST_IO_QUEUE_RELEASED + place * 8, item.sequence + 1);
}

RINGEST_DEVICE_ANY_GROUP
template <class Group, int Mode>
RINGEST_DEVICE_FN bool consumer<Group, Mode>::hand_back() {
    if (!is_claimed() || !held_ || untouchable_) return false;
    bool done = false;
    if (group_.leader()) {
        // The newest ticket of all goes back to where it came from.
        done = detail::replace_u64(device_, next_ + 1, next_);
        for (uint32_t i = 0; i < consumers_ && !done; i++) {
            const uint64_t place = device_ + RINGEST_IO_QUEUE_TICKETS + uint64_t{i} * 8;
            done = detail::load_u64(place) == 0 && detail::replace_u64(place, 0, next_ + 1);
            if (done) detail::add_u32(device_ + detail::handed_at, 1);
        }
    }
    done = group_.broadcast(done);
    held_ = !done;
    return done;
}

template <class Group, int Mode>
RINGEST_DEVICE_FN uint64_t consumer<Group, Mode>::ticket_at(uint32_t place) const {
    return detail::load_u64(device_ + RINGEST_IO_QUEUE_TICKETS + uint64_t{place} * 8);
}

// In every thread: what follows from the leader's result.
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::settle(const result& told, slot& item) {
    const bool popped = told.outcome == RINGEST_OUTCOME_OK || told.outcome == RINGEST_OUTCOME_POISON;
    if (popped) item = told.item;
    if (told.outcome == RINGEST_OUTCOME_ABORTED) {
        error_ = told.error;
        untouchable_ = told.error == detail::stale;
    }
    if (is_claimed()) {
        next_ = told.item.sequence;
        held_ = !popped;
    } else if (popped) {
        popped_++;
        next_ += is(RINGEST_CONSUME_MODE_PARTITIONED) ? consumers_ : 1;
    }
    return told.outcome;
}

// The leader's part of a pop.
template <class Group, int Mode>
RINGEST_DEVICE_FN void consumer<Group, Mode>::poll(result& told) {
    if (is_claimed() && !held_) take_ticket();
    told.outcome = look(told.item);
    // Each swap gives a lower ticket. Without them a consumer could wait for ever for a slot whose earlier sequence
    // nobody holds.
    for (uint32_t swaps = 0; is_claimed() && swaps < consumers_; swaps++) {
        if (told.outcome != RINGEST_OUTCOME_TIMEOUT && told.outcome != RINGEST_OUTCOME_END) break;
        if (!swap_for_lower_ticket()) break;
        told.outcome = look(told.item);
    }
    told.item.sequence = next_;
    told.error = error_;
}

// Looks for next_, once.
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::look(slot& item) {
    if (next_ >= detail::sequence_limit) return corrupt();
    const uint32_t place = static_cast<uint32_t>(next_) & (slot_count_ - 1);
    const uint64_t descriptor = control_ + RINGEST_IO_QUEUE_DESCRIPTORS + uint64_t{place} * sizeof(ringest_descriptor);
    const detail::ends at = detail::ends_of(control_, credit_);

    const uint64_t seq = detail::poll_u64(descriptor);
    const uint32_t abort_word = detail::load_u32(at.abort);
    const uint32_t state = detail::poll_u32(at.state);
    int32_t error = 0;
    if (detail::aborted(at, abort_word, state, error) != RINGEST_OUTCOME_OK) return give_up(error);
    if (seq == next_ + 1) {
        detail::acquire();
        return read(descriptor, place, item);
    }
    // An earlier sequence of this slot, or none yet.
    if (seq != 0 && (seq > next_ || (next_ + 1 - seq) % slot_count_ != 0)) return corrupt();
    const ringest_outcome outcome = detail::not_there(at, state, next_);
    return outcome == RINGEST_OUTCOME_ABORTED ? corrupt() : outcome;
}

// Reads the descriptor of next_, which is published.
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::read(uint64_t descriptor, uint32_t place, slot& item) {
    // Words 1 to 5. The poll was of 8 bytes: data_offset is needed from here anyway, so that a wider one would save no
    // round trip, and what it says beside seq would not be ordered after seq.
    uint64_t seq, landed, tag, file_offset, start, how;
    detail::load_pair(descriptor, seq, landed);
    detail::load_pair(descriptor + 16, tag, file_offset);
    detail::load_pair(descriptor + 32, start, how);
    if (detail::epoch_in(control_) != epoch_) return give_up(detail::stale);
    item.sequence = next_;
    item.status = static_cast<int32_t>(detail::low(landed));
    item.bytes = detail::high(landed);
    item.tag = tag;
    item.file_offset = file_offset;
    item.data_offset = detail::low(start);
    item.crc32c = detail::high(start);
    item.path = static_cast<uint16_t>(how);
    item.flags = static_cast<uint16_t>(how >> 16);
    item.nvme_status = detail::high(how);
    if (item.status > 0 || item.bytes > slot_bytes_ || uint64_t{item.data_offset} + item.bytes > slot_stride_)
        return corrupt();
    item.data = reinterpret_cast<const unsigned char*>(slots_ + place * slot_stride_ + item.data_offset);
    if (!is_claimed()) detail::store_u64(device_ + RINGEST_IO_QUEUE_TICKETS + uint64_t{index_} * 8, popped_ + 1);
    return item.status == 0 ? RINGEST_OUTCOME_OK : RINGEST_OUTCOME_POISON;
}

template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::give_up(int32_t error) {
    error_ = error;
    return RINGEST_OUTCOME_ABORTED;
}

// The shared words make no sense: nobody should go on with them.
template <class Group, int Mode>
RINGEST_DEVICE_FN ringest_outcome consumer<Group, Mode>::corrupt() {
    detail::store_abort(credit_, detail::protocol);
    return give_up(detail::protocol);
}

// Tickets are kept as ticket + 1, so that 0 is none. They carry no data: relaxed accesses do.
template <class Group, int Mode>
RINGEST_DEVICE_FN void consumer<Group, Mode>::take_ticket() {
    held_ = true;
    if (detail::load_u32(device_ + detail::handed_at) != 0) {
        for (uint32_t i = 0; i < consumers_; i++) {
            const uint64_t handed = ticket_at(i);
            if (handed == 0) continue;
            if (!detail::replace_u64(device_ + RINGEST_IO_QUEUE_TICKETS + uint64_t{i} * 8, handed, 0)) continue;
            detail::add_u32(device_ + detail::handed_at, UINT32_MAX);
            next_ = handed - 1;
            return;
        }
    }
    next_ = detail::fetch_add_u64(device_, 1);
}

template <class Group, int Mode>
RINGEST_DEVICE_FN bool consumer<Group, Mode>::swap_for_lower_ticket() {
    if (detail::load_u32(device_ + detail::handed_at) == 0) return false;
    for (uint32_t i = 0; i < consumers_; i++) {
        const uint64_t handed = ticket_at(i);
        if (handed == 0 || handed - 1 >= next_) continue;
        if (!detail::replace_u64(device_ + RINGEST_IO_QUEUE_TICKETS + uint64_t{i} * 8, handed, next_ + 1)) continue;
        next_ = handed - 1;
        return true;
    }
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions

RINGEST_DEVICE_ANY_GROUP
template <class Group>
RINGEST_DEVICE_FN ringest_outcome wait_tail(const ringest_io_queue_view& view, uint64_t n, uint64_t timeout_ns,
                                            Group group, int32_t* error) {
    detail::tail_result told = {RINGEST_OUTCOME_TIMEOUT, 0};
    if (group.leader()) told = detail::wait_for_tail(view, n, timeout_ns);
    told = group.broadcast(told);
    if (told.outcome == RINGEST_OUTCOME_ABORTED && error != nullptr) *error = told.error;
    return told.outcome;
}

RINGEST_DEVICE_ANY_GROUP
template <class Group>
RINGEST_DEVICE_FN ringest_outcome wait_tail(const ringest_tail_line_words* line, uint64_t n, uint64_t timeout_ns,
                                            Group group, int32_t* error) {
    detail::tail_result told = {RINGEST_OUTCOME_TIMEOUT, 0};
    if (group.leader()) told = detail::wait_for_tail(line, n, timeout_ns);
    told = group.broadcast(told);
    if (told.outcome == RINGEST_OUTCOME_ABORTED && error != nullptr) *error = told.error;
    return told.outcome;
}

RINGEST_DEVICE_FN void abort(const ringest_io_queue_view& view, int32_t error) {
    if (!detail::can_be_consumed(view) || detail::examine_header(view) != 0) return;
    detail::store_abort(view.credit, detail::to_error(static_cast<uint32_t>(error)));
}

RINGEST_DEVICE_FN void acquire_for_tma() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

}  // namespace device
}  // namespace ringest

#undef RINGEST_DEVICE_FN
#undef RINGEST_DEVICE_ANY_GROUP

#endif  // RINGEST_DEVICE_CUH
