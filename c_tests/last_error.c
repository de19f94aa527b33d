// The message of the last failure belongs to a thread, and stays until the next failure there.
#include "check.h"
#include <pthread.h>

static void *other(void *unused) {
    CHECK(!strcmp(ringest_last_error(), ""));
    CALL(-EBADF, ringest_mapped_size, NULL);
    CHECK(strstr(ringest_last_error(), "ringest_mapped"));
    return unused;
}

int main(void) {
    struct ringest_mapped *mapped;
    pthread_t thread;
    const char *message;

    CHECK(!strcmp(ringest_last_error(), ""));
    COVER(ringest_last_error, "ok");
    CALL(-EBADF, ringest_buffer_size, NULL);
    message = ringest_last_error();
    CHECK(strstr(message, "ringest_buffer"));
    CHECK(pthread_create(&thread, NULL, other, NULL) == 0 && pthread_join(thread, NULL) == 0);
    CALL(0, ringest_mapped_alloc, 1, NULL, &mapped);
    CHECK(message == ringest_last_error() && strstr(message, "ringest_buffer"));
    CALL(-EINVAL, ringest_mapped_alloc, 0, NULL, &mapped);
    CHECK(strstr(ringest_last_error(), "0 bytes"));
    CALL(0, ringest_mapped_free, mapped);
    return 0;
}
