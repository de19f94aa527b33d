// Sizes, offsets and constants are what they have always been.
#include "check.h"
#include <stddef.h>

#define STRUCT(name, bytes) _Static_assert(sizeof(struct name) == (bytes), "size of " #name);
#define FIELD(name, field, offset, bytes)                                                                              \
    _Static_assert(offsetof(struct name, field) == (offset), "offset of " #name "." #field);                           \
    _Static_assert(sizeof(((struct name *)0)->field) == (bytes), "size of " #name "." #field);
#define CONSTANT(name, value) _Static_assert((name) == (value), #name);
#include "layout.def"

_Static_assert(sizeof(size_t) == 8 && sizeof(void *) == 8, "64 bits");

int main(void) {
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", RINGEST_VERSION_MAJOR, RINGEST_VERSION_MINOR, RINGEST_VERSION_PATCH);
    CHECK(strcmp(text, RINGEST_VERSION_STRING) == 0);
    CHECK(strcmp(ringest_version(), RINGEST_VERSION_STRING) == 0);
    COVER(ringest_version, "ok");
    return 0;
}
