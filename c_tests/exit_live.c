// Processes that end with everything open and reads in flight: by return, by _exit, by a thread's exit(), by a signal.
#include "check.h"
#include <pthread.h>
#include <signal.h>

static void *leave(void *unused) {
    exit(0);
    return unused;
}

int main(void) {
    int way, status;
    pid_t child;

    for (way = 0; way < 4; way++) {
        CHECK((child = fork()) >= 0);
        if (child == 0) {
            struct world w;
            int ends[2], fd = data_file(1 << 20);
            pthread_t thread;
            unlink(data_path);
            open_world(&w, 1 << 20, way % 2 ? RINGEST_RING_SQPOLL : 0, 0);
            pending_read(&w, ends, 4096);
            CALL(1, ringest_stream_submit_read, w.stream, fd, 0, 0, 1 << 20, 0);
            CALL(DONE, ringest_stream_flush, w.stream);
            if (way == 1) _exit(0);
            if (way == 2) {
                CHECK(pthread_create(&thread, NULL, leave, NULL) == 0);
                pause();
            }
            if (way == 3) raise(SIGKILL);
            return 0;
        }
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(way == 3 ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : WIFEXITED(status) && !WEXITSTATUS(status));
    }
    return 0;
}
