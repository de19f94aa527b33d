// The log callback: installed, replaced, removed.
#include "check.h"

struct seen {
    int lines, rings;
    uint32_t highest;
};

static void take(void *user, uint32_t level, const char *target, const char *message) {
    struct seen *seen = (struct seen *)user;
    if (level < RINGEST_LOG_LEVEL_ERROR || level > RINGEST_LOG_LEVEL_TRACE || strncmp(target, "ringest", 7) || !*message)
        _exit(2);
    // Not from in here, and no deadlock either.
    if (seen->lines++ == 0) CALL(-EDEADLK, ringest_log_set_callback, NULL, NULL, RINGEST_LOG_LEVEL_OFF);
    if (level > seen->highest) seen->highest = level;
    if (strstr(message, "ring created")) seen->rings++;
}

int main(void) {
    struct seen first = {0, 0, 0}, second = {0, 0, 0};
    struct world w;

    CALL(-EINVAL, ringest_log_set_callback, take, &first, 6);
    CALL(0, ringest_log_set_callback, take, &first, RINGEST_LOG_LEVEL_TRACE);
    open_world(&w, 4096, 0, 0);
    CHECK(first.lines > 0 && first.rings == 1 && first.highest >= RINGEST_LOG_LEVEL_DEBUG);
    close_world(&w);
    first.lines = 0;
    CALL(0, ringest_log_set_callback, take, &second, RINGEST_LOG_LEVEL_INFO);
    open_world(&w, 4096, 0, 0);
    CHECK(first.lines == 0 && second.highest <= RINGEST_LOG_LEVEL_INFO);
    close_world(&w);
    CALL(0, ringest_log_set_callback, take, &second, RINGEST_LOG_LEVEL_DEBUG);
    open_world(&w, 4096, 0, 0);
    CHECK(second.rings == 1);
    close_world(&w);
    second.lines = 0;
    CALL(0, ringest_log_set_callback, NULL, NULL, RINGEST_LOG_LEVEL_TRACE);
    open_world(&w, 4096, 0, 0);
    close_world(&w);
    CALL(0, ringest_log_set_callback, take, &second, RINGEST_LOG_LEVEL_OFF);
    open_world(&w, 4096, 0, 0);
    close_world(&w);
    CHECK(first.lines == 0 && second.lines == 0);
    return 0;
}
