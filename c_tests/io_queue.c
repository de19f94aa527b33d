// io_queues: options, memory of the caller, publishing by hand, what ends them, and who may destroy them.
#include "queue.h"
#include <pthread.h>

struct later {
    struct ringest_io_queue_options known;
    uint64_t more[4];
};

static void options(void) {
    struct ringest_io_queue_options good, bad;
    struct ringest_io_queue_sizes sizes;
    struct ringest_io_queue *queue = NULL;
    struct ringest_mapped *mapped;
    struct ringest_buffer *b;
    struct later later;
    int i;

    CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &b);
    CALL(0, ringest_io_queue_layout, NULL, &sizes);
    CHECK(sizes.control == RINGEST_IO_QUEUE_DESCRIPTORS + 64 * sizeof(struct ringest_descriptor));
    CHECK(sizes.credit == RINGEST_IO_QUEUE_RELEASED + 64 * 8 && sizes.slot_stride == (1 << 20) + 2 * 4096);
    CHECK(sizes.slots == 64 * sizes.slot_stride && sizes.device >= RINGEST_IO_QUEUE_TICKETS + 8 + 64 * 4);
    CHECK(!sizes.reserved[0] && !sizes.reserved[1] && !sizes.reserved[2]);
    CALL(-EINVAL, ringest_io_queue_layout, NULL, NULL);
    CALL(-EINVAL, ringest_io_queue_create, NULL, NULL);
    CALL(0, ringest_io_queue_create, NULL, &queue);
    CALL(64, ringest_io_queue_free_slots, queue);
    CALL(0, ringest_io_queue_destroy, queue);

    memset(&good, 0, sizeof good);
    good.size = sizeof good;
    for (i = 0; i < 14; i++) {
        bad = good;
        if (i == 0) bad.size = 3;
        if (i == 1) bad.slots = 3;
        if (i == 2) bad.slots = 1;
        if (i == 3) bad.slots = 131072;
        if (i == 4) bad.slot_bytes = (1u << 30) + 1;
        if (i == 5) bad.alignment = 64;
        if (i == 6) bad.alignment = 4 << 20;
        if (i == 7) bad.mode = 4;
        if (i == 8) bad.consumers = 2;
        if (i == 9) bad.mode = RINGEST_CONSUME_MODE_CLAIMED, bad.consumers = 65537;
        if (i == 10) bad.huge_pages = 3;
        if (i == 11) bad.reserved[2] = 1;
        if (i == 12) bad.pinning = 4;
        if (i == 13) bad.gpu = 1;
        queue = NULL;
        CALL(-EINVAL, ringest_io_queue_layout, &bad, &sizes);
        CALL(-EINVAL, ringest_io_queue_create, &bad, &queue);
        CALL(-EINVAL, ringest_io_queue_create_in, &bad, b, b, b, b, &queue);
        CHECK(!queue);
    }
    memset(&later, 0, sizeof later);
    later.known.size = sizeof later;
    CALL(0, ringest_io_queue_layout, &later.known, &sizes);
    later.more[1] = 1;
    CALL(-E2BIG, ringest_io_queue_layout, &later.known, &sizes);
    CALL(-E2BIG, ringest_io_queue_create, &later.known, &queue);
    CALL(-E2BIG, ringest_io_queue_create_in, &later.known, b, b, b, b, &queue);
    CALL(0, ringest_buffer_release, b);
    CALL(0, ringest_mapped_free, mapped);
    // 64 TiB of slots.
    good.slots = 65536;
    good.slot_bytes = 1 << 30;
    if (!SANITIZED) {
        struct rlimit before, little;
        CHECK(getrlimit(RLIMIT_AS, &before) == 0);
        little = before;
        little.rlim_cur = UINT64_C(1) << 40;
        CHECK(setrlimit(RLIMIT_AS, &little) == 0);
        CALL(-ENOMEM, ringest_io_queue_create, &good, &queue);
        CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    }
    CHECK(!queue);
}

// Reserve, fill, publish; consumers see it, and their release makes room.
static void by_hand(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    struct ringest_consumer *consumer;
    struct ringest_slot slot, slots[SLOTS];
    struct ringest_slot_data data;
    struct ringest_popped popped;
    uint32_t i, crc;

    CALL(0, ringest_consumer_create, queue, 0, &consumer);
    for (i = 0; i < 20; i++) {
        CHECK(publish_pattern(queue, i * 1001, 3000 + i) == i);
        CALL(i + 1, ringest_io_queue_tail, queue);
        CHECK(pop_pattern(consumer, i * 1001, 3000 + i) == i);
    }
    CALL(20, ringest_io_queue_reserved, queue);

    // Out of order: the tail waits for the first.
    for (i = 0; i < SLOTS; i++) {
        CALL(0, ringest_io_queue_reserve, queue, &slots[i]);
        CHECK(slots[i].sequence == 20 + i && slots[i].bytes >= SLOT_BYTES && slots[i].reserved[0] == 0);
        CHECK(slots[i].offset == (20 + i) % SLOTS * slots[i].bytes);
    }
    CALL(-EAGAIN, ringest_io_queue_reserve, queue, &slot);
    CALL(-EINVAL, ringest_io_queue_reserve, queue, NULL);
    CALL(0, ringest_io_queue_free_slots, queue);
    memset(&data, 0, sizeof data);
    data.status = -EIO;
    CALL(0, ringest_io_queue_publish, queue, 21, &data);
    CALL(20, ringest_io_queue_tail, queue);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, consumer, &popped);

    // What cannot be published, and stays to be.
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, NULL);
    CALL(-EINVAL, ringest_io_queue_publish, queue, 21, &data);
    CALL(-EINVAL, ringest_io_queue_publish, queue, 19, &data);
    CALL(-EINVAL, ringest_io_queue_publish, queue, 24, &data);
    CALL(-EINVAL, ringest_io_queue_publish, queue, UINT64_MAX, &data);
    data.status = 1;
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, &data);
    data.status = 0;
    data.bytes = SLOT_BYTES + 1;
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, &data);
    data.bytes = 100;
    data.file_offset = 1;
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, &data);
    data.data_offset = (uint32_t)slots[0].bytes - 15;
    CALL(-ERANGE, ringest_io_queue_publish, queue, 20, &data);
    data.data_offset = 1;
    data.flags = RINGEST_DESCRIPTOR_EARLY;
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, &data);
    data.flags = RINGEST_DESCRIPTOR_CRC32C;
    data.reserved[2] = 1;
    CALL(-EINVAL, ringest_io_queue_publish, queue, 20, &data);
    data.reserved[2] = 0;
    for (i = 0; i < 100; i++) ((uint8_t *)slots[0].data)[1 + i] = pattern(1 + i);
    CALL(0, ringest_crc32c, 0, (const uint8_t *)slots[0].data + 1, 100, &crc);
    data.crc32c = crc;
    data.path = RINGEST_READ_PATH_PLAIN_READ;
    data.nvme_status = 9;
    data.tag = 77;
    CALL(0, ringest_io_queue_publish, queue, 20, &data);
    CALL(22, ringest_io_queue_tail, queue);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, consumer, &popped);
    CHECK(popped.sequence == 20 && popped.bytes == 100);
    CHECK(popped.descriptor.tag == 77 && popped.descriptor.crc32c == crc);
    CHECK(popped.descriptor.flags == RINGEST_DESCRIPTOR_CRC32C && popped.descriptor.nvme_status == 9);
    CHECK(popped.descriptor.path == RINGEST_READ_PATH_PLAIN_READ && popped.data == (uint8_t *)slots[0].data + 1);
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_try_pop, consumer, &popped);
    CHECK(popped.sequence == 21 && popped.descriptor.status == -EIO && !popped.data && !popped.bytes);
    CALL(0, ringest_consumer_release, consumer, 21);
    // The next is 20's slot, which is not released.
    CALL(-EAGAIN, ringest_io_queue_reserve, queue, &slot);
    CALL(0, ringest_consumer_release, consumer, 20);
    CALL(2, ringest_io_queue_free_slots, queue);

    // The end: what is reserved is still to come.
    CALL(1, ringest_io_queue_finish, queue);
    CALL(0, ringest_io_queue_finish, queue);
    CALL(-EBUSY, ringest_io_queue_reserve, queue, &slot);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, consumer, &popped);
    memset(&data, 0, sizeof data);
    CALL(0, ringest_io_queue_publish, queue, 22, &data);
    CALL(0, ringest_io_queue_publish, queue, 23, &data);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, consumer, &popped);
    CHECK(!popped.data && !popped.bytes);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, consumer, &popped);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_try_pop, consumer, &popped);
    CALL(0, ringest_io_queue_aborted, queue);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, queue);
}

static void aborted(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    struct ringest_consumer *consumer;
    struct ringest_popped popped;
    struct ringest_slot slot;

    CALL(0, ringest_consumer_create, queue, 0, &consumer);
    publish_pattern(queue, 0, 10);
    CALL(-EINVAL, ringest_io_queue_abort, queue, 0);
    CALL(-EINVAL, ringest_io_queue_abort, queue, -EIO);
    CALL(-EINVAL, ringest_io_queue_abort, queue, 4096);
    CALL(0, ringest_io_queue_aborted, queue);
    CALL(1, ringest_io_queue_abort, queue, EIO);
    CALL(0, ringest_io_queue_abort, queue, EPIPE);
    CALL(EIO, ringest_io_queue_aborted, queue);
    CALL(-ECANCELED, ringest_io_queue_reserve, queue, &slot);
    CALL(0, ringest_io_queue_finish, queue);
    CALL(0, ringest_io_queue_free_slots, queue);
    // It beats what is not popped yet.
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_try_pop, consumer, &popped);
    CALL(EIO, ringest_consumer_error, consumer);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, queue);
}

static int kept;
static void keep(void *user) {
    (void)user;
    kept++;
}

// Parts of the caller's: each large enough, aligned, apart from the others, and of a kind that works.
static void in_memory(void) {
    struct ringest_io_queue_options options;
    struct ringest_io_queue_sizes sizes;
    struct ringest_io_queue *queue = NULL;
    struct ringest_buffer *part[4], *odd, *small, *window;
    struct ringest_consumer *consumer;
    struct ringest_io_queue_view view;
    struct ringest_popped popped;
    struct ringest_control_header *header;
    static uint8_t unused[128 << 10] __attribute__((aligned(4096)));
    uint64_t epoch;
    uint8_t *memory[4];
    int i, k;

    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.slots = SLOTS;
    options.slot_bytes = SLOT_BYTES;
    CALL(0, ringest_io_queue_layout, &options, &sizes);
    for (i = 0; i < 4; i++) {
        memory[i] = (uint8_t *)aligned_alloc(4096, 128 << 10);
        CHECK(memory[i] && sizes.slots <= 128 << 10);
        memset(memory[i], 0xee, 128 << 10);
        CALL(0, ringest_buffer_from_host, memory[i], 128 << 10, i == 3 ? 0 : (uintptr_t)memory[i], &part[i]);
    }
    CALL(-EINVAL, ringest_io_queue_create_in, &options, part[0], part[1], part[2], part[3], NULL);
    for (i = 0; i < 4; i++) {
        struct ringest_buffer *set[4];
        memcpy(set, part, sizeof set);
        set[i] = NULL;
        CALL(-EBADF, ringest_io_queue_create_in, &options, set[0], set[1], set[2], set[3], &queue);
        CALL(0, ringest_buffer_sub_region, part[i], 64, (128 << 10) - 64, &odd);
        set[i] = odd;
        CALL(-EINVAL, ringest_io_queue_create_in, &options, set[0], set[1], set[2], set[3], &queue);
        CALL(0, ringest_buffer_release, odd);
        CALL(0, ringest_buffer_sub_region, part[i], 0, 128, &small);
        set[i] = small;
        CALL(-ERANGE, ringest_io_queue_create_in, &options, set[0], set[1], set[2], set[3], &queue);
        CALL(0, ringest_buffer_release, small);
        set[i] = part[(i + 1) % 4];
        CALL(-EINVAL, ringest_io_queue_create_in, &options, set[0], set[1], set[2], set[3], &queue);
        for (k = 0; k < 128 << 10; k++) CHECK(memory[i][k] == 0xee);
    }
    CALL(0, ringest_io_queue_create_in, &options, part[0], part[1], part[2], part[3], &queue);
    for (i = 0; i < 4; i++) CALL(-EBUSY, ringest_buffer_release, part[i]);
    // No GPU maps the slots.
    CALL(-EOPNOTSUPP, ringest_io_queue_device_view, queue, &view);
    CALL(0, ringest_io_queue_host_view, queue, &view);
    CHECK(view.control == (uintptr_t)memory[0] && view.slots == (uintptr_t)memory[3] && view.slot_count == SLOTS);
    CHECK(view.magic == RINGEST_IO_QUEUE_MAGIC && view.version == RINGEST_IO_QUEUE_VERSION);
    CALL(0, ringest_io_queue_consumers_stopped, queue);

    // The header is what consumers check.
    header = (struct ringest_control_header *)memory[0];
    CHECK(header->magic == view.magic && header->epoch == view.epoch && header->slot_stride == sizes.slot_stride);
    header->slot_count = 8;
    CALL(-EPROTO, ringest_consumer_create, queue, 0, &consumer);
    header->slot_count = SLOTS;
    epoch = header->epoch++;
    CALL(-ESTALE, ringest_consumer_create, queue, 0, &consumer);
    header->epoch = epoch;
    CALL(0, ringest_consumer_create, queue, 0, &consumer);
    publish_pattern(queue, 4, 300);
    pop_pattern(consumer, 4, 300);
    // A descriptor that makes no sense.
    publish_pattern(queue, 4, 300);
    ((struct ringest_descriptor *)(memory[0] + RINGEST_IO_QUEUE_DESCRIPTORS))[1].bytes = UINT32_MAX;
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_try_pop, consumer, &popped);
    CALL(EPROTO, ringest_consumer_error, consumer);
    CALL(EPROTO, ringest_io_queue_aborted, queue);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, queue);

    // Slots and device block may be a device's, which no CPU pops from; control and credit block may not.
    CALL(0, ringest_buffer_from_bar1_peer, unused, sizeof unused, UINT64_C(1) << 40, keep, NULL, &window);
    CALL(-EOPNOTSUPP, ringest_io_queue_create_in, &options, window, part[1], part[2], part[3], &queue);
    CALL(-EOPNOTSUPP, ringest_io_queue_create_in, &options, part[0], window, part[2], part[3], &queue);
    CALL(0, ringest_io_queue_create_in, &options, part[0], part[1], part[2], window, &queue);
    CALL(-EOPNOTSUPP, ringest_consumer_create, queue, 0, &consumer);
    CALL(0, ringest_io_queue_device_view, queue, &view);
    CHECK(view.slots == UINT64_C(1) << 40 && view.control == (uintptr_t)memory[0]);
    {
        // Nothing for the CPU to fill.
        struct ringest_slot slot;
        CALL(0, ringest_io_queue_reserve, queue, &slot);
        CHECK(!slot.data && slot.bytes == sizes.slot_stride);
        // Checksums would need it.
        struct ringest_driver_options checked = driver_options(RINGEST_DRIVER_CRC32C, 0);
        struct ringest_driver_options strict = driver_options(RINGEST_DRIVER_STRICT, 0);
        struct ringest_driver *driver = NULL;
        struct ringest_ring *ring;
        CALL(0, ringest_ring_create, NULL, &ring);
        CALL(-EOPNOTSUPP, ringest_driver_create, ring, queue, &checked, &driver);
        // Nor can such memory be registered by its address.
        CALL(-EOPNOTSUPP, ringest_driver_create, ring, queue, &strict, &driver);
        CALL(0, ringest_ring_destroy, ring);
    }
    CALL(0, ringest_io_queue_consumers_stopped, queue);
    CALL(0, ringest_io_queue_destroy, queue);
    CALL(0, ringest_buffer_release, window);
    for (i = 0; i < 4; i++) {
        CALL(0, ringest_buffer_release, part[i]);
        free(memory[i]);
    }
}

// While a view is out, or somebody has the queue, it cannot be destroyed.
static void lent(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_BROADCAST, 2);
    struct ringest_io_queue_view device, host;
    struct ringest_consumer *consumer, *other = NULL;

    CALL(-EINVAL, ringest_io_queue_device_view, queue, NULL);
    CALL(-EINVAL, ringest_io_queue_host_view, queue, NULL);
    CALL(0, ringest_io_queue_device_view, queue, &device);
    CHECK(device.mode == RINGEST_CONSUME_MODE_BROADCAST && device.consumers == 2 && device.slot_bytes == SLOT_BYTES);
    CALL(-EBUSY, ringest_io_queue_destroy, queue);
    CALL(0, ringest_io_queue_consumers_stopped, queue);
    CALL(0, ringest_io_queue_host_view, queue, &host);
    // Without a GPU they are the same.
    CHECK(device.epoch == host.epoch && device.slots == host.slots && host.flags == 0);
    CALL(-EBUSY, ringest_io_queue_destroy, queue);
    CALL(0, ringest_io_queue_consumers_stopped, queue);
    CALL(0, ringest_consumer_create, queue, 1, &consumer);
    CALL(-EBUSY, ringest_consumer_create, queue, 1, &other);
    CALL(-ERANGE, ringest_consumer_create, queue, 2, &other);
    CALL(-EINVAL, ringest_consumer_create, queue, 0, NULL);
    CHECK(!other);
    CALL(-EBUSY, ringest_io_queue_destroy, queue);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, queue);
    CALL(-EBADF, ringest_io_queue_destroy, queue);
}

// Several threads publish into one queue; a consumer gets every sequence, in order.
enum { EACH = 500, PRODUCERS = 3 };
static struct ringest_io_queue *shared_queue;

static void *produce(void *number) {
    uint32_t done;
    for (done = 0; done < EACH;) {
        struct ringest_slot slot;
        struct ringest_slot_data data;
        int rc = ringest_io_queue_reserve(shared_queue, &slot);
        if (rc == -EAGAIN) continue;
        CHECK(rc == 0);
        memset(&data, 0, sizeof data);
        data.bytes = 8;
        data.tag = (uintptr_t)number;
        memcpy(slot.data, &slot.sequence, 8);
        CHECK(ringest_io_queue_publish(shared_queue, slot.sequence, &data) == 0);
        done++;
    }
    return NULL;
}

static void many_producers(void) {
    pthread_t threads[PRODUCERS];
    struct ringest_consumer *consumer;
    struct ringest_popped popped;
    uint64_t n, counts[PRODUCERS] = {0};
    size_t i;

    shared_queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    CALL(0, ringest_consumer_create, shared_queue, 0, &consumer);
    for (i = 0; i < PRODUCERS; i++) CHECK(pthread_create(&threads[i], NULL, produce, (void *)i) == 0);
    for (n = 0; n < EACH * PRODUCERS; n++) {
        CHECK(ringest_consumer_wait_pop(consumer, 60 * SECOND, &popped) == RINGEST_OUTCOME_OK);
        CHECK(popped.sequence == n && popped.bytes == 8 && memcmp(popped.data, &n, 8) == 0);
        counts[popped.descriptor.tag]++;
        CHECK(ringest_consumer_release(consumer, n) == 0);
    }
    for (i = 0; i < PRODUCERS; i++) CHECK(pthread_join(threads[i], NULL) == 0 && counts[i] == EACH);
    CALL(1, ringest_io_queue_finish, shared_queue);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_wait_pop, consumer, -1, &popped);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, shared_queue);
}

int main(void) {
    struct ringest_leaks leaked;
    options();
    by_hand();
    aborted();
    in_memory();
    lent();
    many_producers();
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.queues == 0 && leaked.bytes == 0 && kept == 1);
    return 0;
}
