// What a consumer does, mode by mode and outcome by outcome.
#include "producer.h"
#include "ringest_device.cuh"

namespace device = ringest::device;

static const uint64_t millisecond = 1000000;

// The item is sequence n of the queue, as it was published.
static bool is_item(const queue& q, const device::slot& item, uint64_t n) {
    return item.sequence == n && item.status == 0 && item.bytes == q.bytes_of(n) && item.tag == n * 3 &&
           item.data_offset == queue::offset_of(n) && item.file_offset == n * 4096 + item.data_offset &&
           item.crc32c == (static_cast<uint32_t>(n) ^ 0xc3c3c3c3u) && item.path == 5 &&
           item.flags == RINGEST_DESCRIPTOR_CRC32C && item.nvme_status == n + 7 &&
           item.data == q.slots.data() + q.place(n) * q.view.slot_stride + item.data_offset &&
           is_payload(item.data, item.bytes, n);
}

template <class Consumer>
static void pops(const queue& q, Consumer& c, uint64_t n) {
    device::slot item;
    CHECK(c.try_pop(item) == RINGEST_OUTCOME_OK);
    CHECK(is_item(q, item, n));
    c.release(item);
}

template <class Consumer>
static ringest_outcome pop(Consumer& c) {
    device::slot item;
    memset(&item, 0xee, sizeof item);
    const device::slot before = item;
    const ringest_outcome outcome = c.try_pop(item);
    if (outcome != RINGEST_OUTCOME_OK && outcome != RINGEST_OUTCOME_POISON)
        CHECK(memcmp(&item, &before, sizeof item) == 0);
    return outcome;
}

static void single_pops_in_order_and_slots_wrap() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 2);
    device::consumer<> c(q.view, 0);
    for (uint64_t n = 0; n < 21; n++) {
        CHECK(c.next() == n);
        CHECK(pop(c) == RINGEST_OUTCOME_TIMEOUT);
        q.publish();
        pops(q, c, n);
        CHECK(get<uint64_t>(q.released(n)) == n + 1);
    }
    CHECK(c.error() == 0 && !c.hand_back());
}

static void the_mode_may_be_fixed() {
    queue q(RINGEST_CONSUME_MODE_BROADCAST, 2);
    device::consumer<device::thread_group, RINGEST_CONSUME_MODE_BROADCAST> c(q.view, 0);
    q.publish();
    pops(q, c, 0);
    device::consumer<device::thread_group, RINGEST_CONSUME_MODE_SINGLE> other(q.view, 0);
    CHECK(pop(other) == RINGEST_OUTCOME_ABORTED && other.error() == -EINVAL);
}

static void partitioned_takes_every_third() {
    queue q(RINGEST_CONSUME_MODE_PARTITIONED, 8, 3);
    device::consumer<> a(q.view, 0), b(q.view, 1), c(q.view, 2);
    for (int i = 0; i < 5; i++) q.publish();
    pops(q, b, 1);
    pops(q, b, 4);
    CHECK(b.next() == 7 && pop(b) == RINGEST_OUTCOME_TIMEOUT);
    pops(q, c, 2);
    pops(q, a, 0);
    pops(q, a, 3);
    q.end();
    CHECK(pop(a) == RINGEST_OUTCOME_END && pop(b) == RINGEST_OUTCOME_END && pop(c) == RINGEST_OUTCOME_END);
}

static void broadcast_gives_a_slot_back_by_its_last_reader() {
    queue q(RINGEST_CONSUME_MODE_BROADCAST, 2, 3);
    device::consumer<> a(q.view, 0), b(q.view, 1), c(q.view, 2);
    device::slot from_a, from_b, from_c;
    for (uint64_t n = 0; n < 7; n++) {
        q.publish();
        CHECK(a.try_pop(from_a) == RINGEST_OUTCOME_OK && is_item(q, from_a, n));
        a.release(from_a);
        CHECK(get<uint64_t>(q.released(n)) != n + 1);
        CHECK(b.try_pop(from_b) == RINGEST_OUTCOME_OK && is_item(q, from_b, n));
        CHECK(c.try_pop(from_c) == RINGEST_OUTCOME_OK && is_item(q, from_c, n));
        c.release(from_c);
        CHECK(get<uint64_t>(q.released(n)) != n + 1 && get<uint32_t>(q.pending(n)) == 0xfffffffeu);
        b.release(from_b);
        CHECK(get<uint64_t>(q.released(n)) == n + 1 && get<uint32_t>(q.pending(n)) == 0);
    }
}

static void claimed_takes_what_nobody_has() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 2);
    // Claimed consumers have no index.
    device::consumer<> a(q.view, 0), b(q.view, 77);
    CHECK(a.next() == UINT64_MAX && !a.hand_back());
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && a.next() == 0);
    CHECK(pop(b) == RINGEST_OUTCOME_TIMEOUT && b.next() == 1);
    q.publish();
    q.publish();
    q.publish();
    pops(q, b, 1);
    pops(q, b, 2);
    CHECK(b.next() == UINT64_MAX);
    // A ticket survives TIMEOUT.
    CHECK(a.next() == 0);
    pops(q, a, 0);
    CHECK(get<uint64_t>(q.claim()) == 3);
}

static void the_newest_ticket_goes_back_to_the_claim_cursor() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 2);
    device::consumer<> a(q.view, 0), b(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(a.hand_back() && a.next() == UINT64_MAX && !a.hand_back());
    CHECK(get<uint64_t>(q.claim()) == 0 && get<uint32_t>(q.handed()) == 0);
    q.publish();
    pops(q, b, 0);
}

static void a_ticket_handed_back_is_taken_first() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 3);
    device::consumer<> a(q.view, 0), b(q.view, 0), c(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && pop(b) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(a.hand_back());
    CHECK(get<uint64_t>(q.claim()) == 2 && get<uint32_t>(q.handed()) == 1 && get<uint64_t>(q.ticket(0)) == 1);
    q.publish();
    pops(q, c, 0);
    CHECK(get<uint32_t>(q.handed()) == 0 && get<uint64_t>(q.ticket(0)) == 0);
}

static void a_waiting_consumer_swaps_for_a_lower_ticket() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 2, 3);
    device::consumer<> a(q.view, 0), b(q.view, 0), c(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && pop(b) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(pop(c) == RINGEST_OUTCOME_TIMEOUT && c.next() == 2);
    // c waits for 2, whose slot is taken by 0, which a gave up.
    q.publish();
    q.publish();
    CHECK(a.hand_back());
    pops(q, c, 0);
    CHECK(get<uint64_t>(q.ticket(0)) == 3 && get<uint32_t>(q.handed()) == 1);
    q.publish();
    pops(q, b, 1);
    pops(q, b, 2);
    CHECK(get<uint32_t>(q.handed()) == 0 && get<uint64_t>(q.claim()) == 3);
}

static void a_consumer_at_the_end_swaps_too() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 2);
    device::consumer<> a(q.view, 0), b(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && pop(b) == RINGEST_OUTCOME_TIMEOUT);
    q.publish();
    q.end();
    CHECK(pop(b) == RINGEST_OUTCOME_END && b.next() == 1);
    CHECK(a.hand_back());
    pops(q, b, 0);
    CHECK(pop(b) == RINGEST_OUTCOME_END);
    CHECK(pop(a) == RINGEST_OUTCOME_END);
}

static void a_higher_ticket_is_left_alone() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 3);
    device::consumer<> a(q.view, 0), b(q.view, 0), c(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && pop(b) == RINGEST_OUTCOME_TIMEOUT && pop(c) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(b.hand_back() && get<uint64_t>(q.ticket(0)) == 2);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && a.next() == 0 && get<uint64_t>(q.ticket(0)) == 2);
}

static void there_are_as_many_places_for_tickets_as_consumers() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 1);
    device::consumer<> a(q.view, 0), b(q.view, 0), c(q.view, 0);
    CHECK(pop(a) == RINGEST_OUTCOME_TIMEOUT && pop(b) == RINGEST_OUTCOME_TIMEOUT && pop(c) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(a.hand_back());
    CHECK(!b.hand_back() && b.next() == 1);
    q.publish();
    q.publish();
    pops(q, b, 1);
}

static void a_failed_read_is_poison_and_is_released() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 2);
    device::consumer<> c(q.view, 0);
    device::slot item;
    q.publish();
    q.poison(-EIO);
    pops(q, c, 0);
    CHECK(c.try_pop(item) == RINGEST_OUTCOME_POISON);
    CHECK(item.sequence == 1 && item.status == -EIO && item.tag == 3 && item.bytes == 0);
    c.release(item);
    CHECK(get<uint64_t>(q.released(1)) == 2);
    q.publish();
    pops(q, c, 2);
}

static void the_end_comes_after_what_was_published() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0);
    q.publish();
    q.end();
    pops(q, c, 0);
    CHECK(pop(c) == RINGEST_OUTCOME_END && pop(c) == RINGEST_OUTCOME_END && c.error() == 0);
    // Not yet published, but it will come.
    queue later(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> d(later.view, 0);
    put<uint64_t>(later.end_at(), 1);
    put<uint32_t>(later.state(), RINGEST_STATE_END, __ATOMIC_RELEASE);
    CHECK(pop(d) == RINGEST_OUTCOME_TIMEOUT);
    later.publish();
    pops(later, d, 0);
    CHECK(pop(d) == RINGEST_OUTCOME_END);
}

static void an_abort_of_the_producer_beats_what_is_not_popped() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0);
    device::slot item;
    q.publish();
    q.publish();
    CHECK(c.try_pop(item) == RINGEST_OUTCOME_OK);
    q.abort(-ECANCELED);
    CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == -ECANCELED && c.next() == 1);
    // What was popped stays, and can be released.
    CHECK(is_item(q, item, 0));
    c.release(item);
    CHECK(get<uint64_t>(q.released(0)) == 1);
    // For good.
    put<uint32_t>(q.state(), RINGEST_STATE_OPEN);
    CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == -ECANCELED);
    CHECK(q.abort_word() == 0);
}

static void an_abort_of_a_device_reaches_all() {
    queue q(RINGEST_CONSUME_MODE_BROADCAST, 4, 2);
    device::consumer<> a(q.view, 0), b(q.view, 1);
    q.publish();
    device::abort(q.view, -ENOTSUP);
    device::abort(q.view, -EIO);
    CHECK(q.abort_word() == -ENOTSUP);
    CHECK(pop(a) == RINGEST_OUTCOME_ABORTED && a.error() == -ENOTSUP);
    CHECK(pop(b) == RINGEST_OUTCOME_ABORTED && b.error() == -ENOTSUP);
    q.reset();
    device::abort(q.view, 5);
    CHECK(q.abort_word() == -EPROTO);
    q.reset();
    ringest_io_queue_view stale = q.view;
    stale.epoch++;
    device::abort(stale, -EIO);
    CHECK(q.abort_word() == 0);
}

static void errors_that_are_none_are_eproto() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> a(q.view, 0), b(q.view, 0);
    q.abort(17);
    CHECK(pop(a) == RINGEST_OUTCOME_ABORTED && a.error() == -EPROTO);
    put<int32_t>(q.view.credit, 3);
    CHECK(pop(b) == RINGEST_OUTCOME_ABORTED && b.error() == -EPROTO);
    queue far(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(far.view, 0);
    far.abort(INT32_MIN);
    CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == -EPROTO);
}

static void a_ticket_survives_an_abort() {
    queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 2);
    device::consumer<> c(q.view, 0);
    CHECK(pop(c) == RINGEST_OUTCOME_TIMEOUT);
    q.abort(-EIO);
    CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.next() == 0);
    CHECK(c.hand_back() && get<uint64_t>(q.claim()) == 0);
}

static void several_slots_are_held_and_released_in_any_order() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0);
    device::slot held[4];
    for (uint64_t n = 0; n < 4; n++) {
        q.publish();
        CHECK(c.try_pop(held[n]) == RINGEST_OUTCOME_OK);
    }
    CHECK(!q.has_room() && pop(c) == RINGEST_OUTCOME_TIMEOUT);
    for (uint64_t n : {2u, 0u, 3u, 1u}) {
        CHECK(is_item(q, held[n], n));
        c.release(held[n]);
        CHECK(get<uint64_t>(q.released(n)) == n + 1);
    }
    q.publish();
    pops(q, c, 4);
}

static void a_new_consumer_goes_on_where_the_last_one_was() {
    for (ringest_consume_mode mode :
         {RINGEST_CONSUME_MODE_SINGLE, RINGEST_CONSUME_MODE_PARTITIONED, RINGEST_CONSUME_MODE_BROADCAST}) {
        const uint32_t consumers = mode == RINGEST_CONSUME_MODE_SINGLE ? 1 : 2;
        const uint64_t step = mode == RINGEST_CONSUME_MODE_PARTITIONED ? 2 : 1;
        const uint32_t index = consumers - 1;
        queue q(mode, 16, consumers);
        for (int i = 0; i < 10; i++) q.publish();
        q.poison(-EIO);
        uint64_t n = mode == RINGEST_CONSUME_MODE_PARTITIONED ? index : 0;
        for (int life = 0; life < 4; life++, n += step) {
            device::consumer<> c(q.view, index);
            CHECK(c.next() == n);
            pops(q, c, n);
        }
        while (n < 10) {
            device::consumer<> c(q.view, index);
            pops(q, c, n);
            n += step;
        }
        if (n == 10) {
            device::consumer<> c(q.view, index);
            CHECK(pop(c) == RINGEST_OUTCOME_POISON);
            n += step;
        }
        device::consumer<> c(q.view, index);
        CHECK(c.next() == n && pop(c) == RINGEST_OUTCOME_TIMEOUT);
    }
}

// A change to the view that makes it bad.
struct flaw {
    const char* what;
    void (*make)(ringest_io_queue_view&);
};

static void a_bad_view_touches_nothing() {
    static const flaw flaws[] = {
        {"magic", [](ringest_io_queue_view& v) { v.magic++; }},
        {"version", [](ringest_io_queue_view& v) { v.version++; }},
        {"mode", [](ringest_io_queue_view& v) { v.mode = 4; }},
        {"no slots", [](ringest_io_queue_view& v) { v.slot_count = 0; }},
        {"one slot", [](ringest_io_queue_view& v) { v.slot_count = 1; }},
        {"three slots", [](ringest_io_queue_view& v) { v.slot_count = 3; }},
        {"too many slots", [](ringest_io_queue_view& v) { v.slot_count = 131072; }},
        {"no consumers", [](ringest_io_queue_view& v) { v.consumers = 0; }},
        {"too many consumers", [](ringest_io_queue_view& v) { v.consumers = 65537; }},
        {"two of a single one", [](ringest_io_queue_view& v) { v.mode = RINGEST_CONSUME_MODE_SINGLE; }},
        {"index", [](ringest_io_queue_view& v) { v.consumers = 1; }},
        {"bytes over stride", [](ringest_io_queue_view& v) { v.slot_bytes = v.slot_stride + 1; }},
        {"no control block", [](ringest_io_queue_view& v) { v.control = 0; }},
        {"no credit block", [](ringest_io_queue_view& v) { v.credit = 0; }},
        {"no device block", [](ringest_io_queue_view& v) { v.device = 0; }},
        {"no slots' address", [](ringest_io_queue_view& v) { v.slots = 0; }},
        {"control block unaligned", [](ringest_io_queue_view& v) { v.control += 64; }},
        {"credit block unaligned", [](ringest_io_queue_view& v) { v.credit += 8; }},
        {"device block unaligned", [](ringest_io_queue_view& v) { v.device += 1; }},
        {"slots unaligned", [](ringest_io_queue_view& v) { v.slots += 16; }},
    };
    for (const flaw& f : flaws) {
        queue q(RINGEST_CONSUME_MODE_BROADCAST, 4, 2);
        f.make(q.view);
        for (const fenced* part : {&q.control, &q.credit, &q.device, &q.slots}) part->forbid();
        device::consumer<> c(q.view, 1);
        device::slot item = {};
        int32_t error = 0;
        if (pop(c) != RINGEST_OUTCOME_ABORTED || c.error() != -EINVAL) {
            fprintf(stderr, "a view with this flaw was taken: %s\n", f.what);
            _exit(1);
        }
        CHECK(c.wait_pop(item, UINT64_MAX) == RINGEST_OUTCOME_ABORTED);
        c.release(item);
        CHECK(!c.hand_back());
        if (strcmp(f.what, "index") == 0) continue;
        CHECK(device::wait_tail(q.view, 0, UINT64_MAX, device::thread_group(), &error) == RINGEST_OUTCOME_ABORTED);
        CHECK(error == -EINVAL);
        device::abort(q.view, -EIO);
    }
}

static void the_memory_of_another_queue_is_not_written_to() {
    for (uint64_t word = 0; word < 7; word++) {
        if (word == 2) continue;
        queue q(RINGEST_CONSUME_MODE_CLAIMED, 4, 2);
        q.publish();
        // magic, version, slot_count, slot_stride, slot_bytes, epoch
        static const uint64_t offsets[] = {0, 4, 0, 12, 16, 24, 32};
        (*at<uint32_t>(q.view.control + offsets[word]))++;
        for (const fenced* part : {&q.control, &q.credit, &q.device, &q.slots}) part->permit_reads();
        device::consumer<> c(q.view, 0);
        device::slot item = {};
        CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == (word == 6 ? -ESTALE : -EPROTO));
        c.release(item);
        CHECK(!c.hand_back());
        device::abort(q.view, -EIO);
    }
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    int32_t error = 0;
    q.publish();
    q.view.epoch++;
    q.credit.permit_reads();
    CHECK(device::wait_tail(q.view, 0, 0, device::thread_group(), &error) == RINGEST_OUTCOME_ABORTED);
    CHECK(error == -ESTALE);
}

static void the_epoch_is_looked_at_by_every_pop() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0), d(q.view, 0);
    device::slot item = {};
    q.publish();
    pops(q, d, 0);
    put<uint64_t>(q.released(0), 0);
    put<uint64_t>(q.view.control + 0x20, 1);
    CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == -ESTALE);
    c.release(item);
    CHECK(get<uint64_t>(q.released(0)) == 0 && q.abort_word() == 0);
    // Not by the first alone.
    q.publish();
    CHECK(pop(d) == RINGEST_OUTCOME_ABORTED && d.error() == -ESTALE);
    d.release(item);
    CHECK(get<uint64_t>(q.released(0)) == 0 && q.abort_word() == 0);
}

// Words that cannot be: one consumer sees them, all learn it.
static void words_that_make_no_sense_abort_the_queue() {
    for (int what = 0; what < 9; what++) {
        queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
        device::consumer<> c(q.view, 0), other(q.view, 0);
        for (uint64_t n = 0; n < 5; n++) {
            q.publish();
            pops(q, c, n);
        }
        // Next is 5, in slot 1, whose seq is 2.
        const uint64_t words = q.descriptor(5);
        switch (what) {
        case 0: put<uint64_t>(words, 3); break;
        case 1: put<uint64_t>(words, 7); break;
        case 2: put<uint64_t>(words, 10); break;
        case 3: put<uint64_t>(words, UINT64_MAX); break;
        case 4: put<uint32_t>(q.state(), 3); break;
        case 5: q.describe(1, 10, 0), q.finish(); break;
        case 6: q.describe(0, static_cast<uint32_t>(q.view.slot_bytes) + 1, 0), q.finish(); break;
        case 7: q.describe(0, 200, 57), q.finish(); break;
        default: q.describe(-EIO, 0, UINT32_MAX), q.finish(); break;
        }
        CHECK(pop(c) == RINGEST_OUTCOME_ABORTED && c.error() == -EPROTO);
        CHECK(q.abort_word() == -EPROTO);
        CHECK(pop(other) == RINGEST_OUTCOME_ABORTED && other.error() == -EPROTO);
    }
    // As far as it may go.
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0);
    q.describe(0, 200, 56);
    q.finish();
    CHECK(pop(c) == RINGEST_OUTCOME_OK);
    // No sequence is that large.
    queue far(RINGEST_CONSUME_MODE_SINGLE, 4);
    put<uint64_t>(far.ticket(0), UINT64_MAX);
    device::consumer<> d(far.view, 0);
    CHECK(pop(d) == RINGEST_OUTCOME_ABORTED && d.error() == -EPROTO);
    queue parts(RINGEST_CONSUME_MODE_PARTITIONED, 4, 4);
    put<uint64_t>(parts.ticket(1), uint64_t{1} << 62);
    device::consumer<> e(parts.view, 1);
    CHECK(pop(e) == RINGEST_OUTCOME_ABORTED && e.error() == -EPROTO);
}

static uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

static void a_wait_lasts_as_long_as_it_should() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 4);
    device::consumer<> c(q.view, 0);
    device::slot item;
    uint64_t start = now();
    CHECK(c.wait_pop(item, 20 * millisecond) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(now() - start >= 20 * millisecond);
    start = now();
    CHECK(device::wait_tail(q.view, 0, 20 * millisecond) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(now() - start >= 20 * millisecond);
    q.publish();
    CHECK(c.wait_pop(item, UINT64_MAX) == RINGEST_OUTCOME_OK && is_item(q, item, 0));
}

static void a_tail_says_how_far_all_is_there() {
    queue q(RINGEST_CONSUME_MODE_SINGLE, 8);
    int32_t error = 0;
    const device::thread_group alone;
    CHECK(device::wait_tail(q.view, 0, 0) == RINGEST_OUTCOME_TIMEOUT);
    q.publish();
    q.publish();
    CHECK(device::wait_tail(q.view, 0, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(q.view, 1, UINT64_MAX) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(q.view, 2, 0) == RINGEST_OUTCOME_TIMEOUT);
    q.poison(-EIO);
    q.publish();
    CHECK(device::wait_tail(q.view, 1, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(q.view, 2, 0) == RINGEST_OUTCOME_POISON);
    CHECK(device::wait_tail(q.view, 3, 0) == RINGEST_OUTCOME_POISON);
    CHECK(device::wait_tail(q.view, 4, 0) == RINGEST_OUTCOME_POISON);
    q.end();
    CHECK(device::wait_tail(q.view, 4, 0) == RINGEST_OUTCOME_POISON);
    CHECK(device::wait_tail(q.view, 3, 0) == RINGEST_OUTCOME_POISON);
    put<uint64_t>(q.first_bad(), UINT64_MAX);
    CHECK(device::wait_tail(q.view, 4, 0) == RINGEST_OUTCOME_END);
    CHECK(device::wait_tail(q.view, 3, 0) == RINGEST_OUTCOME_OK);
    device::abort(q.view, -ENODEV);
    CHECK(device::wait_tail(q.view, 1, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(q.view, 4, 0, alone, &error) == RINGEST_OUTCOME_ABORTED && error == -ENODEV);
    q.reset();
    q.abort(-ECANCELED);
    CHECK(device::wait_tail(q.view, 0, 0, alone, &error) == RINGEST_OUTCOME_ABORTED && error == -ECANCELED);
    q.reset();
    put<uint32_t>(q.state(), 77);
    CHECK(device::wait_tail(q.view, 0, 0, alone, &error) == RINGEST_OUTCOME_ABORTED && error == -EPROTO);
    CHECK(q.abort_word() == -EPROTO);
}

static void a_streams_tail_line_says_it_too() {
    fenced memory(128);
    ringest_tail_line_words* line = at<ringest_tail_line_words>(memory.address());
    int32_t error = 0;
    const device::thread_group alone;
    line->first_bad = UINT64_MAX;
    line->tail = 3;
    CHECK(device::wait_tail(line, 2, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(line, 3, 0) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(device::wait_tail(line, 3, millisecond) == RINGEST_OUTCOME_TIMEOUT);
    // A failed submission holds the tail; a skipped one does not.
    line->first_bad = 3;
    CHECK(device::wait_tail(line, 3, 0) == RINGEST_OUTCOME_POISON);
    line->tail = 4;
    CHECK(device::wait_tail(line, 3, 0) == RINGEST_OUTCOME_POISON);
    CHECK(device::wait_tail(line, 2, 0) == RINGEST_OUTCOME_OK);
    line->first_bad = UINT64_MAX;
    line->end = 5;
    line->state = RINGEST_STATE_END;
    CHECK(device::wait_tail(line, 3, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(line, 4, 0) == RINGEST_OUTCOME_TIMEOUT);
    CHECK(device::wait_tail(line, 5, UINT64_MAX) == RINGEST_OUTCOME_END);
    line->error = -EIO;
    line->state = RINGEST_STATE_ABORTED;
    CHECK(device::wait_tail(line, 3, 0) == RINGEST_OUTCOME_OK);
    CHECK(device::wait_tail(line, 4, 0, alone, &error) == RINGEST_OUTCOME_ABORTED && error == -EIO);
    line->state = 3;
    CHECK(device::wait_tail(line, 4, 0, alone, &error) == RINGEST_OUTCOME_ABORTED && error == -EPROTO);
}

int main() {
    single_pops_in_order_and_slots_wrap();
    the_mode_may_be_fixed();
    partitioned_takes_every_third();
    broadcast_gives_a_slot_back_by_its_last_reader();
    claimed_takes_what_nobody_has();
    the_newest_ticket_goes_back_to_the_claim_cursor();
    a_ticket_handed_back_is_taken_first();
    a_waiting_consumer_swaps_for_a_lower_ticket();
    a_consumer_at_the_end_swaps_too();
    a_higher_ticket_is_left_alone();
    there_are_as_many_places_for_tickets_as_consumers();
    a_failed_read_is_poison_and_is_released();
    the_end_comes_after_what_was_published();
    an_abort_of_the_producer_beats_what_is_not_popped();
    an_abort_of_a_device_reaches_all();
    errors_that_are_none_are_eproto();
    a_ticket_survives_an_abort();
    several_slots_are_held_and_released_in_any_order();
    a_new_consumer_goes_on_where_the_last_one_was();
    a_bad_view_touches_nothing();
    the_memory_of_another_queue_is_not_written_to();
    the_epoch_is_looked_at_by_every_pop();
    words_that_make_no_sense_abort_the_queue();
    a_wait_lasts_as_long_as_it_should();
    a_tail_says_how_far_all_is_there();
    a_streams_tail_line_says_it_too();
    puts("ok");
}
