// No address space left for a tail line.
#include "check.h"

int main(void) {
    struct ringest_tail_line *line = NULL, *before;
    struct rlimit nothing = {4096, RLIM_INFINITY};
    if (SANITIZED) skip("the sanitizer needs address space of its own");
    CALL(0, ringest_tail_line_alloc, &before);
    CALL(-EINVAL, ringest_tail_line_alloc, NULL);
    CHECK(setrlimit(RLIMIT_AS, &nothing) == 0);
    CALL(-ENOMEM, ringest_tail_line_alloc, &line);
    CHECK(!line);
    nothing.rlim_cur = RLIM_INFINITY;
    CHECK(setrlimit(RLIMIT_AS, &nothing) == 0);
    CALL(0, ringest_tail_line_free, before);
    return 0;
}
