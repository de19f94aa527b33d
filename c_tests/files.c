// Files by path and by descriptor.
#include "check.h"
#include <sys/socket.h>

int main(void) {
    struct ringest_file *file, *none = NULL;
    uint32_t memory = 7, offset = 7;
    int data = data_file(10000), ends[2], directory, fd, flags;
    char path[64];

    CALL(0, ringest_file_open, data_path, RINGEST_DIRECT_OFF, &file);
    CALL(10000, ringest_file_size, file);
    CALL(0, ringest_file_direct, file, &memory, &offset);
    CHECK(memory == 0 && offset == 0);
    CALL(0, ringest_file_direct, file, NULL, NULL);
    CALL(0, ringest_file_close, file);
    CALL(0, ringest_file_open, data_path, RINGEST_DIRECT_AUTO, &file);
    if (CALL(DONE, ringest_file_direct, file, &memory, &offset)) CHECK(memory && offset && !(offset & (offset - 1)));
    CALL(0, ringest_file_close, file);

    CALL(-ENOENT, ringest_file_open, "no-such-file", 0, &none);
    COVER(ringest_file_open, "open(2)");
    CALL(-ENOENT, ringest_file_open, "", 0, &none);
    CALL(-EISDIR, ringest_file_open, ".", 0, &none);
    CALL(-ESPIPE, ringest_file_open, "/dev/null", 0, &none);
    snprintf(path, sizeof path, "ringest-fifo-%d", (int)getpid());
    CHECK(mkfifo(path, 0600) == 0);
    CALL(-ESPIPE, ringest_file_open, path, 0, &none);
    unlink(path);
    CALL(-EINVAL, ringest_file_open, NULL, 0, &none);
    CALL(-EINVAL, ringest_file_open, data_path, 3, &none);
    CALL(-EINVAL, ringest_file_open, data_path, 0, NULL);
    // A file system without O_DIRECT.
    CALL(-EOPNOTSUPP, ringest_file_open, "/proc/self/maps", RINGEST_DIRECT_ON, &none);
    fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    CALL(-EOPNOTSUPP, ringest_file_from_fd, fd, RINGEST_DIRECT_ON, &none);
    close(fd);

    flags = fcntl(data, F_GETFL);
    CALL(0, ringest_file_from_fd, data, RINGEST_DIRECT_AUTO, &file);
    CHECK(fcntl(data, F_GETFL) == flags);
    CALL(10000, ringest_file_size, file);
    CALL(0, ringest_file_close, file);
    CALL(-EBADF, ringest_file_from_fd, -1, 0, &none);
    CALL(-EBADF, ringest_file_from_fd, 4000, 0, &none);
    CALL(-EINVAL, ringest_file_from_fd, data, 9, &none);
    CALL(-EINVAL, ringest_file_from_fd, data, 0, NULL);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(-ESPIPE, ringest_file_from_fd, ends[0], 0, &none);
    directory = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CALL(-EISDIR, ringest_file_from_fd, directory, 0, &none);
    // Opening once more needs a descriptor, as open(2) does.
    {
        struct rlimit old, none_left = {0, 0};
        CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
        none_left.rlim_max = old.rlim_max;
        CHECK(setrlimit(RLIMIT_NOFILE, &none_left) == 0);
        CALL(-EMFILE, ringest_file_from_fd, data, 0, &none);
        CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
        COVER(ringest_file_from_fd, "open(2)");
    }
    CHECK(none == NULL);
    close(ends[0]);
    close(ends[1]);
    close(directory);
    close(data);
    return 0;
}
