// The least program: a whole file in memory, and its checksum.
#include <inttypes.h>
#include <ringest.h>
#include <stdio.h>

int main(int argc, char **argv) {
    struct ringest_file *file;
    struct ringest_mapped *memory;
    struct ringest_buffer *buffer;
    struct ringest_ring *ring;
    struct ringest_stream *stream;
    static uint64_t tail; // 1 once the file is in memory: what a consumer would poll
    void *data;
    uint32_t crc;
    if (argc != 2 || ringest_file_open(argv[1], RINGEST_DIRECT_AUTO, &file) < 0 ||
        ringest_mapped_alloc((size_t)ringest_file_size(file), NULL, &memory) < 0 ||
        ringest_mapped_share(memory, &buffer) < 0 || ringest_mapped_host_ptr(memory, &data) < 0 ||
        ringest_ring_create(NULL, &ring) < 0 || ringest_stream_create_u64(ring, buffer, &tail, NULL, &stream) < 0 ||
        ringest_stream_submit_read_file(stream, file, 0, 0, (size_t)ringest_file_size(file), 0) < 0 ||
        ringest_stream_wait(stream, 1, -1) < 0 || ringest_stream_poll(stream) < 0 ||
        ringest_crc32c(0, data, (size_t)ringest_file_size(file), &crc) < 0 || ringest_stream_destroy(stream) < 0) {
        fprintf(stderr, "minimal: %s\n", argc == 2 ? ringest_last_error() : "usage: minimal FILE");
        return 1;
    }
    printf("%" PRId64 " bytes, CRC32C %08" PRIx32 "\n", ringest_file_size(file), crc);
}
