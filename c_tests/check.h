// What every program here shares: checked calls that record what they covered, and a small world of handles.
#ifndef RINGEST_CHECK_H
#define RINGEST_CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <ringest.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __cplusplus
#define UNUSED [[maybe_unused]] static
#else
#define UNUSED __attribute__((unused)) static
#endif

// Any result >= 0.
#define DONE INT64_MAX
#define SECOND INT64_C(1000000000)

UNUSED void fail(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: %s; last error: %s\n", file, line, what, ringest_last_error());
    fflush(stderr);
    _exit(1);
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) fail(__FILE__, __LINE__, "not so: " #condition);                                             \
    } while (0)

UNUSED void skip(const char *why) {
    printf("SKIP %s\n", why);
    fflush(stdout);
    _exit(77);
}

// Appends "FUNCTION OUTCOME" to the file that RINGEST_COVERAGE names.
UNUSED void cover(const char *function, const char *outcome) {
    // Opened once: later this process may have no right or no descriptor to do it.
    static int fd = -1;
    const char *path = getenv("RINGEST_COVERAGE");
    char line[128];
    int length;
    if (!path) return;
    if (fd < 0) fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    length = snprintf(line, sizeof line, "%s %s\n", function, outcome);
    if (fd < 0 || write(fd, line, (size_t)length) != length) fail(path, 0, "cannot record coverage");
}

#define COVER(function, outcome) ((void)sizeof(&function), cover(#function, outcome))

UNUSED int64_t check_call(const char *file, int line, const char *function, int64_t expected, int64_t result) {
    char text[192];
    if (expected == DONE ? result < 0 : result != expected) {
        snprintf(text, sizeof text, "%s gave %lld (%s), not %lld", function, (long long)result,
                 result < 0 ? strerror((int)-result) : "ok", (long long)(expected == DONE ? 0 : expected));
        fail(file, line, text);
    }
    if (result >= 0) {
        cover(function, "ok");
    } else {
        snprintf(text, sizeof text, "-%s", strerrorname_np((int)-result));
        if (!*ringest_last_error()) fail(file, line, "an error without a message");
        cover(function, text);
    }
    return result;
}

// For results of calls that had to be made by hand.
#define COVER_CALL(function, result) check_call(__FILE__, __LINE__, #function, (result), (result))

// Calls a function that returns 0, a count, or -errno, and demands a result: DONE, a value, or -errno.
#define CALL(expected, function, ...) check_call(__FILE__, __LINE__, #function, (expected), function(__VA_ARGS__))

UNUSED bool on_valgrind(void) { return getenv("RINGEST_ON_VALGRIND") != NULL; }

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

UNUSED uint8_t pattern(uint64_t at) { return (uint8_t)((at * UINT64_C(0x9e3779b97f4a7c15)) >> 56); }

UNUSED bool is_pattern(const uint8_t *data, uint64_t from, size_t len) {
    size_t i;
    for (i = 0; i < len; i++)
        if (data[i] != pattern(from + i)) return false;
    return true;
}

// A file with `len` bytes of the pattern; a descriptor for it. Removed when the process that made it exits normally.
static char data_path[64];
static pid_t data_owner;
UNUSED void remove_data(void) {
    if (data_owner == getpid()) unlink(data_path);
}
UNUSED int data_file(size_t len) {
    uint8_t *bytes = (uint8_t *)malloc(len);
    size_t i;
    int fd;
    strcpy(data_path, "ringest-data-XXXXXX");
    fd = mkstemp(data_path);
    CHECK(fd >= 0 && bytes);
    data_owner = getpid();
    atexit(remove_data);
    for (i = 0; i < len; i++) bytes[i] = pattern(i);
    CHECK(write(fd, bytes, len) == (ssize_t)len && fsync(fd) == 0);
    free(bytes);
    return fd;
}

// A ring, memory, a tail line and a stream over them.
struct world {
    struct ringest_ring *ring;
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer;
    struct ringest_tail_line *line;
    struct ringest_stream *stream;
    uint8_t *data;
    const struct ringest_tail_line_words *words;
};

UNUSED void open_world(struct world *w, size_t len, uint32_t ring_flags, uint32_t stream_flags) {
    struct ringest_ring_options ring;
    struct ringest_stream_options stream;
    memset(&ring, 0, sizeof ring);
    ring.size = sizeof ring;
    ring.flags = ring_flags;
    memset(&stream, 0, sizeof stream);
    stream.size = sizeof stream;
    stream.flags = stream_flags;
    memset(w, 0, sizeof *w);
    CALL(0, ringest_ring_create, &ring, &w->ring);
    CALL(0, ringest_mapped_alloc, len, NULL, &w->mapped);
    CALL(0, ringest_mapped_host_ptr, w->mapped, (void **)&w->data);
    CALL(0, ringest_mapped_share, w->mapped, &w->buffer);
    CALL(0, ringest_tail_line_alloc, &w->line);
    CALL(0, ringest_tail_line_host_ptr, w->line, &w->words);
    CALL(0, ringest_stream_create, w->ring, w->buffer, w->line, &stream, &w->stream);
}

UNUSED void close_world(struct world *w) {
    if (w->stream) CALL(0, ringest_stream_destroy, w->stream);
    CALL(0, ringest_ring_destroy, w->ring);
    CALL(0, ringest_tail_line_free, w->line);
    CALL(0, ringest_buffer_release, w->buffer);
    CALL(0, ringest_mapped_free, w->mapped);
}

UNUSED uint64_t tail_of(const struct world *w) { return __atomic_load_n(&w->words->tail, __ATOMIC_ACQUIRE); }
UNUSED uint64_t first_bad_of(const struct world *w) { return __atomic_load_n(&w->words->first_bad, __ATOMIC_ACQUIRE); }
UNUSED uint32_t state_of(const struct world *w) { return __atomic_load_n(&w->words->state, __ATOMIC_ACQUIRE); }
UNUSED int32_t error_of(const struct world *w) { return __atomic_load_n(&w->words->error, __ATOMIC_ACQUIRE); }
UNUSED uint64_t end_of(const struct world *w) { return __atomic_load_n(&w->words->end, __ATOMIC_ACQUIRE); }

// Waits for one more record and takes it.
UNUSED struct ringest_completion next_record(struct ringest_stream *stream) {
    struct ringest_completion record;
    CALL(DONE, ringest_stream_wait, stream, 1, 10 * SECOND);
    CALL(1, ringest_stream_poll_into, stream, &record, 1);
    return record;
}

// A read that stays in flight: from a pipe that nobody writes to. ends[1] finishes it.
UNUSED void pending_read(struct world *w, int ends[2], size_t len) {
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(DONE, ringest_stream_submit_read, w->stream, ends[0], 0, 0, len, 77);
    CALL(DONE, ringest_stream_flush, w->stream);
}

#endif
