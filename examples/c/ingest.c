// Reads a file into memory while a consumer thread, which sees only the tail line and the data, checksums it.
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <ringest.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCK = 1 << 20 }; // submission n is block n of the file

struct consumer {
    const struct ringest_tail_line_words *line;
    const uint8_t *data;
    uint64_t len, bytes;
    uint32_t crc;
    int32_t error; // -errno by which the producer failed
};

// Takes block after block as the tail passes them, until the end, a failure or the producer's abort.
static void *consume(void *arg) {
    struct consumer *c = arg;
    for (uint64_t n = 0;;) {
        uint32_t state = __atomic_load_n(&c->line->state, __ATOMIC_ACQUIRE); // first: the last tail follows from it
        uint64_t tail = __atomic_load_n(&c->line->tail, __ATOMIC_ACQUIRE);
        uint64_t first_bad = __atomic_load_n(&c->line->first_bad, __ATOMIC_ACQUIRE);
        if (first_bad <= n || (tail <= n && state == RINGEST_STATE_ABORTED))
            return c->error = __atomic_load_n(&c->line->error, __ATOMIC_ACQUIRE), NULL;
        if (state == RINGEST_STATE_END && __atomic_load_n(&c->line->end, __ATOMIC_RELAXED) == n) return NULL;
        if (tail <= n) continue;
        uint64_t len = c->len - c->bytes < BLOCK ? c->len - c->bytes : BLOCK;
        ringest_crc32c(c->crc, c->data + n++ * BLOCK, len, &c->crc);
        c->bytes += len;
    }
}

static int64_t check(int64_t rc) {
    if (rc >= 0) return rc;
    fprintf(stderr, "ingest: %s\n", ringest_last_error());
    exit(1); // with reads in flight, too: the kernel ends them before it takes the memory
}

int main(int argc, char **argv) {
    struct ringest_file *file;
    struct ringest_mapped *memory;
    struct ringest_buffer *buffer;
    struct ringest_tail_line *line;
    struct ringest_ring *ring;
    struct ringest_stream *stream;
    pthread_t thread;
    struct consumer c = {0};
    if (argc != 2) return fprintf(stderr, "usage: ingest FILE\n"), 2;
    check(ringest_file_open(argv[1], RINGEST_DIRECT_AUTO, &file));
    c.len = (uint64_t)check(ringest_file_size(file));
    check(ringest_mapped_alloc(c.len ? c.len : 1, NULL, &memory));
    check(ringest_mapped_host_ptr(memory, (void **)&c.data));
    check(ringest_mapped_share(memory, &buffer));
    check(ringest_tail_line_alloc(&line));
    check(ringest_tail_line_host_ptr(line, &c.line));
    check(ringest_ring_create(NULL, &ring));
    check(ringest_stream_create(ring, buffer, line, NULL, &stream));
    if (pthread_create(&thread, NULL, consume, &c) != 0) return perror("ingest: pthread_create"), 1;

    for (uint64_t at = 0, n; at < c.len || check(ringest_stream_inflight(stream)) > 0;) {
        for (; at < c.len; at += n) { // as many as the stream takes
            n = c.len - at < BLOCK ? c.len - at : BLOCK;
            int64_t rc = ringest_stream_submit_read_file(stream, file, at, at, n, 0);
            if (rc == -EAGAIN) break;
            check(rc);
        }
        check(ringest_stream_wait(stream, 1, -1));
        check(ringest_stream_poll(stream));
    }
    check(ringest_stream_finish(stream));
    check(ringest_stream_close(stream, -1)); // the line says END or ABORTED now: the consumer returns
    pthread_join(thread, NULL);
    printf("%" PRIu64 " bytes, CRC32C %08" PRIx32 "\n", c.bytes, c.crc);
    if (c.error) fprintf(stderr, "ingest: the consumer was told of error %" PRId32 "\n", c.error);
    check(ringest_ring_destroy(ring) | ringest_tail_line_free(line) | ringest_buffer_release(buffer));
    return check(ringest_mapped_free(memory) | ringest_file_close(file)) || c.error || c.bytes != c.len;
}
