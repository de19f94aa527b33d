// The library loaded, given up and loaded again, with a ring and a read in flight in between: it stays.
#include <dlfcn.h>
#include <fcntl.h>
#include <ringest.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            const char *why = dlerror();                                                                               \
            fprintf(stderr, "%s:%d: not so: %s; %s\n", __FILE__, __LINE__, #condition, why ? why : "");                \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define LOAD(name) __typeof__(name) *name##_ = (__typeof__(name) *)dlsym(library, #name)

int main(void) {
    struct ringest_ring *ring;
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer;
    struct ringest_stream *stream;
    struct ringest_completion record;
    uint64_t word;
    void *library, *again, *data;
    int ends[2];

    CHECK((library = dlopen(RINGEST_LIBRARY, RTLD_NOW | RTLD_LOCAL)));
    {
        LOAD(ringest_ring_create);
        LOAD(ringest_mapped_alloc);
        LOAD(ringest_mapped_share);
        LOAD(ringest_mapped_host_ptr);
        LOAD(ringest_stream_create_u64);
        LOAD(ringest_stream_submit_read);
        LOAD(ringest_stream_flush);
        CHECK(ringest_ring_create_(NULL, &ring) == 0 && ringest_mapped_alloc_(4096, NULL, &mapped) == 0);
        CHECK(ringest_mapped_share_(mapped, &buffer) == 0 && ringest_mapped_host_ptr_(mapped, &data) == 0);
        CHECK(ringest_stream_create_u64_(ring, buffer, &word, NULL, &stream) == 0);
        CHECK(pipe(ends) == 0);
        CHECK(ringest_stream_submit_read_(stream, ends[0], 0, 0, 4, 1) == 0 && ringest_stream_flush_(stream) == 1);
    }
    CHECK(dlclose(library) == 0);
    CHECK(write(ends[1], "stay", 4) == 4);
    CHECK((again = dlopen(RINGEST_LIBRARY, RTLD_NOW | RTLD_NOLOAD)));
    library = again;
    {
        LOAD(ringest_stream_wait);
        LOAD(ringest_stream_poll_into);
        LOAD(ringest_stream_destroy);
        LOAD(ringest_ring_destroy);
        LOAD(ringest_buffer_release);
        LOAD(ringest_mapped_free);
        LOAD(ringest_version);
        CHECK(ringest_stream_wait_(stream, 1, -1) == 1 && ringest_stream_poll_into_(stream, &record, 1) == 1);
        CHECK(record.status == 0 && memcmp(data, "stay", 4) == 0);
        CHECK(ringest_stream_destroy_(stream) == 0 && ringest_ring_destroy_(ring) == 0);
        CHECK(ringest_buffer_release_(buffer) == 0 && ringest_mapped_free_(mapped) == 0);
        CHECK(strcmp(ringest_version_(), RINGEST_VERSION_STRING) == 0);
    }
    CHECK(dlclose(library) == 0);
    return 0;
}
