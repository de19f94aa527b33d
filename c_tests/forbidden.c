// Where no ring is to be had: forbidden, not built in, no memory, no descriptors.
#include "seccomp.h"

static struct ringest_ring *none;

static void forbidden(void) {
    deny(SYS_io_uring_setup, -1, EPERM);
    CALL(-EPERM, ringest_ring_create, NULL, &none);
    CHECK(strstr(ringest_last_error(), "seccomp") && !none);
}

static void absent(void) {
    deny(SYS_io_uring_setup, -1, ENOSYS);
    CALL(-ENOSYS, ringest_ring_create, NULL, &none);
}

static void no_memory(void) {
    deny(SYS_io_uring_setup, -1, ENOMEM);
    CALL(-ENOMEM, ringest_ring_create, NULL, &none);
}

static void no_descriptors(void) {
    struct rlimit few = {0, 0};
    cover("ringest_version", "ok");
    CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
    CALL(-EMFILE, ringest_ring_create, NULL, &none);
}

static void no_memory_to_share(void) {
    struct world w;
    struct ringest_shared_buffers *shared = NULL;
    const struct ringest_buffer *list[1];
    open_world(&w, 4096, 0, 0);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    deny(SYS_io_uring_setup, -1, ENOMEM);
    CALL(-ENOMEM, ringest_ring_share_buffers, w.ring, &shared);
    CHECK(!shared);
    close_world(&w);
}

// The kernel is short of resources for now.
static void later(void) {
    struct world w;
    open_world(&w, 4096, 0, 0);
    CALL(0, ringest_stream_submit_read, w.stream, 0, 0, 0, 64, 0);
    deny(SYS_io_uring_enter, -1, EAGAIN);
    CALL(-EAGAIN, ringest_stream_flush, w.stream);
    CHECK(strstr(ringest_last_error(), "poll again"));
}

int main(void) {
    in_child(later);
    in_child(forbidden);
    in_child(absent);
    in_child(no_memory);
    if (!on_valgrind()) in_child(no_descriptors); // It keeps a descriptor limit to itself.
    in_child(no_memory_to_share);
    return 0;
}
