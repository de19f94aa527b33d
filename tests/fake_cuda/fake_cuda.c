// A libcuda for machines without a GPU: the calls that ringest makes, over plain host memory, with books kept.
//
// Work in streams is done at once. What a program must not do (use a context that is not current, give back twice, copy
// to what it may not access) is counted as a misuse; what it has not given back is counted as live. Any call can be made
// to fail. `FAKE_CUDA_DEVICES` (1) GPUs; `FAKE_CUDA_INIT` is what cuInit returns; the k-th call from now fails with a code
// by `fake_cuda_fail(k, code)`.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef unsigned int CUresult;
typedef uint64_t CUdeviceptr;
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400, NOT_FOUND = 500, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_SUPPORTED = 801,
};
enum { GRANULARITY = 2 << 20, DEVICES = 16, OBJECTS = 1 << 14, LOG = 1 << 16, STACK = 32 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// ---- control ----

static long calls, fail_at;
static unsigned fail_code;
static const char *names[LOG];
static long misuses;
static char misuse_text[256];

static void misuse(const char *what, const char *call) {
    if (!misuses++) snprintf(misuse_text, sizeof misuse_text, "%s in %s", what, call);
}

void fake_cuda_fail(long k, unsigned code) {
    pthread_mutex_lock(&lock);
    calls = 0, fail_at = k, fail_code = code;
    pthread_mutex_unlock(&lock);
}
long fake_cuda_calls(void) { return calls; }
const char *fake_cuda_call(long k) { return k >= 1 && k <= calls && k <= LOG ? names[k - 1] : ""; }
long fake_cuda_misuses(void) { return misuses; }
const char *fake_cuda_misuse(void) { return misuse_text; }

// Counts the call; what it is to fail with, or 0.
static CUresult enter_call(const char *name) {
    if (calls < LOG) names[calls] = name;
    calls++;
    return calls == fail_at ? fail_code : OK;
}

#define CALL() \
    pthread_mutex_lock(&lock); \
    CUresult planned_ = enter_call(__func__); \
    if (planned_) return pthread_mutex_unlock(&lock), planned_
#define RETURN(code) return pthread_mutex_unlock(&lock), (code)

// ---- contexts ----

typedef struct { int device, retained; } Context;
static Context primary[DEVICES], other[DEVICES];
static int initialised;
static _Thread_local Context *stack[STACK];
static _Thread_local int depth;
static _Thread_local unsigned capture_mode;

static int devices(void) {
    const char *text = getenv("FAKE_CUDA_DEVICES");
    int count = text ? atoi(text) : 1;
    return count < 0 ? 0 : count > DEVICES ? DEVICES : count;
}
static Context *current(void) { return depth ? stack[depth - 1] : 0; }

long fake_cuda_depth(void) { return depth; }
unsigned fake_cuda_capture_mode(void) { return capture_mode; }
// Calls that need a context, with the capture mode relaxed: others could break a capture of another thread.
#define IN_CONTEXT() \
    CALL(); \
    if (!current()) { misuse("no context", __func__); RETURN(INVALID_CONTEXT); } \
    if (!current()->retained) { misuse("a dead context", __func__); RETURN(INVALID_CONTEXT); } \
    if (capture_mode != 2) misuse("capture mode not relaxed", __func__)

CUresult cuInit(unsigned flags) {
    CALL();
    const char *text = getenv("FAKE_CUDA_INIT");
    if (text && atoi(text)) RETURN((CUresult)atoi(text));
    if (flags) RETURN(INVALID_VALUE);
    if (!devices()) RETURN(100);
    initialised = 1;
    RETURN(OK);
}
CUresult cuDriverGetVersion(int *version) { CALL(); *version = 13000; RETURN(OK); }
CUresult cuGetErrorName(CUresult code, const char **name) {
    switch (code) {
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return OK;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return OK;
    case 100: *name = "CUDA_ERROR_NO_DEVICE"; return OK;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; return OK;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; return OK;
    case 999: *name = "CUDA_ERROR_UNKNOWN"; return OK;
    default: *name = 0; return INVALID_VALUE;
    }
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    const char *name;
    *text = cuGetErrorName(code, &name) ? 0 : "said the fake";
    return *text ? OK : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count) { CALL(); *count = devices(); RETURN(initialised ? OK : 3); }
CUresult cuDeviceGet(int *device, int ordinal) {
    CALL();
    if (!initialised) RETURN(3);
    if (ordinal < 0 || ordinal >= devices()) RETURN(INVALID_DEVICE);
    *device = ordinal;
    RETURN(OK);
}
CUresult cuDeviceGetName(char *name, int len, int device) {
    CALL();
    snprintf(name, (size_t)len, "Fake GPU %d", device);
    RETURN(OK);
}
CUresult cuDeviceGetAttribute(int *value, unsigned attribute, int device) {
    CALL();
    switch (attribute) {
    case 16: *value = 8; break;
    case 18: *value = 0; break;
    case 33: *value = 0xf0 + device; break;
    case 34: case 50: *value = 0; break;
    case 40: *value = 2; break;
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    case 99: case 102: case 103: case 110: case 116: case 117: case 122: case 124: case 141: *value = 1; break;
    case 118: *value = 100; break;
    case 134: *value = 0; break;
    default: RETURN(INVALID_VALUE);
    }
    const char *lacking = getenv("FAKE_CUDA_LACKING_ATTRIBUTE");
    if (lacking && (unsigned)atoi(lacking) == attribute) *value = 0;
    RETURN(OK);
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { CALL(); (void)device; *bytes = 8ul << 30; RETURN(OK); }
CUresult cuDeviceCanAccessPeer(int *can, int device, int peer) {
    CALL();
    *can = device != peer;
    RETURN(OK);
}
CUresult cuDevicePrimaryCtxRetain(Context **context, int device) {
    CALL();
    primary[device].device = device;
    primary[device].retained++;
    *context = &primary[device];
    RETURN(OK);
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    CALL();
    if (!primary[device].retained) { misuse("released more often than retained", __func__); RETURN(INVALID_CONTEXT); }
    primary[device].retained--;
    RETURN(OK);
}
CUresult cuCtxCreate_v2(Context **context, unsigned flags, int device) {
    CALL();
    (void)flags;
    if (depth == STACK) RETURN(INVALID_VALUE);
    other[device] = (Context){device, 1};
    *context = stack[depth++] = &other[device];
    RETURN(OK);
}
CUresult cuCtxDestroy_v2(Context *context) {
    CALL();
    context->retained = 0;
    if (current() == context) depth--;
    RETURN(OK);
}
CUresult cuCtxPushCurrent_v2(Context *context) {
    CALL();
    if (!context || !context->retained) { misuse("a dead context", __func__); RETURN(INVALID_CONTEXT); }
    if (depth == STACK) RETURN(INVALID_VALUE);
    stack[depth++] = context;
    RETURN(OK);
}
CUresult cuCtxPopCurrent_v2(Context **context) {
    CALL();
    if (!depth) { misuse("nothing to pop", __func__); RETURN(INVALID_CONTEXT); }
    *context = stack[--depth];
    RETURN(OK);
}
CUresult cuCtxGetCurrent(Context **context) { CALL(); *context = current(); RETURN(OK); }
CUresult cuCtxGetDevice(int *device) {
    CALL();
    if (!current()) RETURN(INVALID_CONTEXT);
    *device = current()->device;
    RETURN(OK);
}
CUresult cuCtxSynchronize(void) { IN_CONTEXT(); RETURN(OK); }
CUresult cuThreadExchangeStreamCaptureMode(unsigned *mode) {
    CALL();
    unsigned before = capture_mode;
    if (*mode > 2) RETURN(INVALID_VALUE);
    capture_mode = *mode;
    *mode = before;
    RETURN(OK);
}

// ---- what can be live ----

typedef enum {
    NONE, DEVICE, HOST, REGISTERED, RESERVED, PHYSICAL, MAPPED, STREAM, EVENT, MODULE, EXTERNAL, KINDS
} Kind;
static const char *kind_names[KINDS] = {"", "device memory", "host memory", "registration", "reservation", "physical",
                                        "mapping", "stream", "event", "module", "external"};
typedef struct {
    Kind kind;
    uint64_t base, size;
    Context *context;
    int fd;                        // PHYSICAL
    uint64_t location;             // PHYSICAL: kind << 32 | id
    unsigned handle_types, rdma;   // PHYSICAL
    unsigned access[DEVICES + 1];  // MAPPED: by device, the host last
} Object;
static Object objects[OBJECTS];
static int used;

long fake_cuda_live(void) {
    long live = 0;
    for (int i = 0; i < used; i++) live += objects[i].kind != NONE;
    for (int i = 0; i < DEVICES; i++) live += primary[i].retained;
    return live;
}
const char *fake_cuda_report(void) {
    static char text[512];
    int at = 0;
    text[0] = 0;
    for (int kind = 1; kind < KINDS; kind++) {
        int count = 0;
        for (int i = 0; i < used; i++) count += objects[i].kind == (Kind)kind;
        if (count) at += snprintf(text + at, sizeof text - (size_t)at, "%d %s, ", count, kind_names[kind]);
    }
    for (int i = 0; i < DEVICES; i++)
        if (primary[i].retained)
            at += snprintf(text + at, sizeof text - (size_t)at, "%d retains of %d, ", primary[i].retained, i);
    return text;
}

static Object *add(Kind kind, uint64_t base, uint64_t size) {
    for (int i = 0; i < OBJECTS; i++) {
        if (objects[i].kind != NONE) continue;
        if (i >= used) used = i + 1;
        objects[i] = (Object){.kind = kind, .base = base, .size = size, .context = current(), .fd = -1};
        return &objects[i];
    }
    abort();
}
static Object *at(Kind kind, uint64_t base) {
    for (int i = 0; i < used; i++)
        if (objects[i].kind == kind && objects[i].base == base) return &objects[i];
    return 0;
}
static Object *holding(Kind kind, uint64_t address) {
    for (int i = 0; i < used; i++)
        if (objects[i].kind == kind && address >= objects[i].base && address - objects[i].base < objects[i].size)
            return &objects[i];
    return 0;
}
static int check_owner(const Object *object, const char *call) {
    if (object->context == current()) return 1;
    misuse("another context's object", call);
    return 0;
}
// How device `n` addresses locked host memory: the first as the host does, the others elsewhere.
static uint64_t shift(void) { return (uint64_t)current()->device << 46; }

// ---- memory ----

CUresult cuMemGetInfo_v2(size_t *left, size_t *total) { IN_CONTEXT(); *left = 7ul << 30, *total = 8ul << 30; RETURN(OK); }
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    IN_CONTEXT();
    if (!bytes) RETURN(INVALID_VALUE);
    if (bytes > 8ul << 30) RETURN(OUT_OF_MEMORY);
    void *memory = aligned_alloc(4096, (bytes + 4095) & ~4095ul);
    if (!memory) RETURN(OUT_OF_MEMORY);
    memset(memory, 0xdd, bytes);
    *address = (uint64_t)memory;
    add(DEVICE, *address, bytes);
    RETURN(OK);
}
CUresult cuMemFree_v2(CUdeviceptr address) {
    IN_CONTEXT();
    Object *object = at(DEVICE, address);
    if (!object) { misuse("freed twice, or never allocated", __func__); RETURN(INVALID_VALUE); }
    check_owner(object, __func__);
    object->kind = NONE;
    free((void *)address);
    RETURN(OK);
}
CUresult cuMemHostAlloc(void **host, size_t bytes, unsigned flags) {
    IN_CONTEXT();
    if (flags != 3) misuse("flags", __func__);
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) RETURN(OUT_OF_MEMORY);
    memset(memory, 0xdd, bytes < 1 << 24 ? bytes : 1 << 24);
    add(HOST, (uint64_t)memory, bytes);
    *host = memory;
    RETURN(OK);
}
CUresult cuMemFreeHost(void *host) {
    IN_CONTEXT();
    Object *object = at(HOST, (uint64_t)host);
    if (!object) { misuse("freed twice, or never allocated", __func__); RETURN(INVALID_VALUE); }
    check_owner(object, __func__);
    munmap(host, object->size);
    object->kind = NONE;
    RETURN(OK);
}
CUresult cuMemHostRegister_v2(void *host, size_t bytes, unsigned flags) {
    IN_CONTEXT();
    if (!host || !bytes || (flags & ~15u)) RETURN(INVALID_VALUE);
    if (holding(REGISTERED, (uint64_t)host)) RETURN(ALREADY_REGISTERED);
    // Reads every page: what is not there faults in here.
    for (size_t i = 0; i < bytes; i += 4096) (void)((volatile char *)host)[i];
    add(REGISTERED, (uint64_t)host, bytes);
    RETURN(OK);
}
CUresult cuMemHostUnregister(void *host) {
    IN_CONTEXT();
    Object *object = at(REGISTERED, (uint64_t)host);
    if (!object) { misuse("not registered", __func__); RETURN(NOT_REGISTERED); }
    check_owner(object, __func__);
    // It must still be mapped.
    volatile char *bytes = host;
    (void)(bytes[0] + bytes[object->size - 1]);
    object->kind = NONE;
    RETURN(OK);
}
static Object *locked(uint64_t address) {
    Object *object = holding(REGISTERED, address);
    return object ? object : holding(HOST, address);
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *host, unsigned flags) {
    IN_CONTEXT();
    if (flags || !locked((uint64_t)host)) RETURN(INVALID_VALUE);
    *address = (uint64_t)host + shift();
    RETURN(OK);
}
CUresult cuPointerGetAttribute(void *data, unsigned attribute, CUdeviceptr address) {
    IN_CONTEXT();
    Object *device = holding(DEVICE, address), *host = locked(address);
    if (!device) device = holding(MAPPED, address);
    Object *object = device ? device : host;
    if (!object) RETURN(INVALID_VALUE);
    switch (attribute) {
    case 2: *(unsigned *)data = device ? 2 : 1; break;
    case 3: *(uint64_t *)data = device ? address : address + shift(); break;
    case 6: *(unsigned *)data = 0; break;
    case 9: *(int *)data = object->context->device; break;
    case 11: *(uint64_t *)data = object->base; break;
    case 12: *(size_t *)data = object->size; break;
    default: RETURN(INVALID_VALUE);
    }
    RETURN(OK);
}
static uint64_t sync_memops;
uint64_t fake_cuda_sync_memops(void) { return sync_memops; }
CUresult cuPointerSetAttribute(const void *value, unsigned attribute, CUdeviceptr address) {
    IN_CONTEXT();
    if (attribute != 6 || *(const unsigned *)value != 1 || !(holding(DEVICE, address) || holding(MAPPED, address)))
        RETURN(INVALID_VALUE);
    sync_memops = address;
    RETURN(OK);
}

// Whether the current device may access the whole range; 0 also for what is no device memory.
static int accessible(uint64_t address, size_t bytes, int writing) {
    uint64_t end = address + bytes;
    while (address < end) {
        Object *object = holding(DEVICE, address);
        if (!object) object = locked(address - shift());
        if (!object) {
            object = holding(MAPPED, address);
            if (!object || !(object->access[current()->device] & (writing ? 2 : 1))) return 0;
        }
        uint64_t of = object->kind == HOST || object->kind == REGISTERED ? shift() : 0;
        address = object->base + of + object->size;
    }
    return 1;
}
#define ON_STREAM() \
    Object *on_stream_ = at(STREAM, (uint64_t)stream); \
    if (!on_stream_) { misuse("no stream of ours", __func__); RETURN(INVALID_HANDLE); } \
    check_owner(on_stream_, __func__)
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, void *stream) {
    IN_CONTEXT();
    ON_STREAM();
    if (!accessible(target, bytes, 1)) RETURN(INVALID_VALUE);
    memcpy((void *)target, source, bytes);
    RETURN(OK);
}
CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, void *stream) {
    IN_CONTEXT();
    ON_STREAM();
    if (!accessible(source, bytes, 0)) RETURN(INVALID_VALUE);
    memcpy(target, (void *)source, bytes);
    RETURN(OK);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, void *stream) {
    IN_CONTEXT();
    ON_STREAM();
    if (!accessible(source, bytes, 0) || !accessible(target, bytes, 1)) RETURN(INVALID_VALUE);
    memmove((void *)target, (void *)source, bytes);
    RETURN(OK);
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, void *stream) {
    IN_CONTEXT();
    ON_STREAM();
    if (!accessible(target, count, 1)) RETURN(INVALID_VALUE);
    memset((void *)target, value, count);
    RETURN(OK);
}

// ---- virtual memory ----

typedef struct {
    unsigned type, handle_types, location_kind;
    int location_id;
    void *win32;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
} Properties;
typedef struct { unsigned kind; int id; unsigned flags; } Access;

static CUresult check_properties(const Properties *p) {
    if (p->type != 1 || p->win32 || p->compression || p->usage || (p->handle_types & ~1u)) return INVALID_VALUE;
    if (p->location_kind == 1) return p->location_id >= 0 && p->location_id < devices() ? OK : INVALID_DEVICE;
    return p->location_kind == 3 && p->location_id == 0 ? OK : INVALID_VALUE;
}
CUresult cuMemGetAllocationGranularity(size_t *bytes, const Properties *properties, unsigned option) {
    IN_CONTEXT();
    CUresult checked = option > 1 ? INVALID_VALUE : check_properties(properties);
    if (!checked) *bytes = GRANULARITY;
    RETURN(checked);
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr hint, uint64_t flags) {
    IN_CONTEXT();
    if (!bytes || bytes % GRANULARITY || (alignment & (alignment - 1)) || flags) RETURN(INVALID_VALUE);
    if (bytes > 1ul << 45) RETURN(OUT_OF_MEMORY);
    (void)hint;
    if (alignment < GRANULARITY) alignment = GRANULARITY;
    char *raw = mmap(0, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) RETURN(OUT_OF_MEMORY);
    uint64_t start = ((uint64_t)raw + alignment - 1) & ~((uint64_t)alignment - 1), raw_end = (uint64_t)raw + bytes + alignment;
    if (start > (uint64_t)raw) munmap(raw, start - (uint64_t)raw);
    if (start + bytes < raw_end) munmap((void *)(start + bytes), raw_end - start - bytes);
    add(RESERVED, start, bytes);
    *address = start;
    RETURN(OK);
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    IN_CONTEXT();
    Object *object = at(RESERVED, address);
    if (!object || object->size != bytes) { misuse("no such reservation", __func__); RETURN(INVALID_VALUE); }
    for (int i = 0; i < used; i++)
        if (objects[i].kind == MAPPED && objects[i].base >= address && objects[i].base < address + bytes) {
            misuse("still mapped", __func__);
            RETURN(INVALID_VALUE);
        }
    munmap((void *)address, bytes);
    object->kind = NONE;
    RETURN(OK);
}
CUresult cuMemCreate(uint64_t *handle, size_t bytes, const Properties *p, uint64_t flags) {
    IN_CONTEXT();
    CUresult checked = check_properties(p);
    if (checked) RETURN(checked);
    if (!bytes || bytes % GRANULARITY || flags) RETURN(INVALID_VALUE);
    if (bytes > 8ul << 30) RETURN(OUT_OF_MEMORY);
    int fd = memfd_create("fake-vram", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes)) { close(fd); RETURN(OUT_OF_MEMORY); }
    static uint64_t next = 0x1000;
    Object *object = add(PHYSICAL, *handle = next++, bytes);
    object->fd = fd, object->handle_types = p->handle_types, object->rdma = p->rdma;
    object->location = (uint64_t)p->location_kind << 32 | (unsigned)p->location_id;
    RETURN(OK);
}
CUresult cuMemRelease(uint64_t handle) {
    IN_CONTEXT();
    Object *object = at(PHYSICAL, handle);
    if (!object) { misuse("released twice, or never created", __func__); RETURN(INVALID_VALUE); }
    close(object->fd);
    object->kind = NONE;
    RETURN(OK);
}
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, uint64_t handle, uint64_t flags) {
    IN_CONTEXT();
    Object *physical = at(PHYSICAL, handle), *space = holding(RESERVED, address);
    if (offset || (physical && bytes != physical->size)) RETURN(NOT_SUPPORTED);
    if (!physical || !space || flags || !bytes || bytes % GRANULARITY || address % GRANULARITY)
        RETURN(INVALID_VALUE);
    if (address + bytes > space->base + space->size) RETURN(INVALID_VALUE);
    for (uint64_t at = address; at < address + bytes; at += GRANULARITY)
        if (holding(MAPPED, at)) { misuse("mapped twice", __func__); RETURN(INVALID_VALUE); }
    void *mapped = mmap((void *)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0);
    if (mapped == MAP_FAILED) RETURN(OUT_OF_MEMORY);
    add(MAPPED, address, bytes);
    RETURN(OK);
}
CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    IN_CONTEXT();
    Object *object = at(MAPPED, address);
    if (!object || object->size != bytes) { misuse("not a whole mapping", __func__); RETURN(INVALID_VALUE); }
    mmap((void *)address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    object->kind = NONE;
    RETURN(OK);
}
static int slot(unsigned kind, int id) {
    if (kind == 1) return id >= 0 && id < devices() ? id : -1;
    return kind == 2 || kind == 3 ? DEVICES : -1;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const Access *access, size_t count) {
    IN_CONTEXT();
    uint64_t end = address + bytes, next = address;
    for (size_t i = 0; i < count; i++) {
        if (slot(access[i].kind, access[i].id) < 0) RETURN(access[i].kind == 1 ? INVALID_DEVICE : INVALID_VALUE);
        if (access[i].flags == 2 || access[i].flags > 3) RETURN(INVALID_VALUE);
    }
    while (next < end) {
        Object *object = at(MAPPED, next);
        if (!object) break;
        next += object->size;
    }
    if (next != end) { misuse("not whole mappings", __func__); RETURN(INVALID_VALUE); }
    for (next = address; next < end;) {
        Object *object = at(MAPPED, next);
        int protection = PROT_NONE;
        for (size_t i = 0; i < count; i++) object->access[slot(access[i].kind, access[i].id)] = access[i].flags;
        for (int i = 0; i <= DEVICES; i++)
            if (object->access[i]) protection = PROT_READ | PROT_WRITE;
        mprotect((void *)next, object->size, protection);
        next += object->size;
    }
    RETURN(OK);
}
CUresult cuMemGetAccess(uint64_t *flags, const Access *location, CUdeviceptr address) {
    IN_CONTEXT();
    Object *object = holding(MAPPED, address);
    int of = slot(location->kind, location->id);
    if (!object || of < 0) RETURN(INVALID_VALUE);
    *flags = object->access[of];
    RETURN(OK);
}
CUresult cuMemExportToShareableHandle(void *shareable, uint64_t handle, unsigned kind, uint64_t flags) {
    IN_CONTEXT();
    Object *object = at(PHYSICAL, handle);
    if (!object || !(object->handle_types & 1) || kind != 1 || flags) RETURN(INVALID_VALUE);
    *(int *)shareable = dup(object->fd);
    RETURN(OK);
}
CUresult cuMemImportFromShareableHandle(uint64_t *handle, void *shareable, unsigned kind) {
    IN_CONTEXT();
    struct stat stat;
    int fd = (int)(intptr_t)shareable;
    if (kind != 1 || fstat(fd, &stat) || stat.st_size % GRANULARITY || !stat.st_size) RETURN(INVALID_VALUE);
    static uint64_t next = 0x100000;
    Object *object = add(PHYSICAL, *handle = next++, (uint64_t)stat.st_size);
    object->fd = dup(fd), object->location = 1ul << 32;
    RETURN(OK);
}
CUresult cuMemGetAllocationPropertiesFromHandle(Properties *p, uint64_t handle) {
    IN_CONTEXT();
    Object *object = at(PHYSICAL, handle);
    if (!object) RETURN(INVALID_VALUE);
    memset(p, 0, sizeof *p);
    p->type = 1, p->handle_types = object->handle_types, p->rdma = (unsigned char)object->rdma;
    p->location_kind = (unsigned)(object->location >> 32), p->location_id = (int)(uint32_t)object->location;
    RETURN(OK);
}
CUresult cuMemGetHandleForAddressRange(void *handle, CUdeviceptr address, size_t bytes, unsigned kind, uint64_t flags) {
    IN_CONTEXT();
    if (kind != 1 || flags || !bytes || address % 4096 || bytes % 4096 || !accessible(address, bytes, 0))
        RETURN(INVALID_VALUE);
    int fd = memfd_create("fake-dma-buf", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes)) { close(fd); RETURN(OUT_OF_MEMORY); }
    *(int *)handle = fd;
    RETURN(OK);
}

// ---- streams, kernels, imports ----

static void *fresh(Kind kind) {
    static uint64_t next = 0x5000;
    add(kind, next, 1);
    return (void *)next++;
}
#define GONE(kind_, handle) \
    IN_CONTEXT(); \
    Object *object = at(kind_, (uint64_t)(handle)); \
    if (!object) { misuse("given back twice, or never made", __func__); RETURN(INVALID_HANDLE); } \
    check_owner(object, __func__); \
    object->kind = NONE; \
    RETURN(OK)
#define ON_EVENT() \
    if (!at(EVENT, (uint64_t)event)) { misuse("no event of ours", __func__); RETURN(INVALID_HANDLE); }

CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    IN_CONTEXT();
    (void)priority;
    if (flags != 1) misuse("a blocking stream", __func__);
    *stream = fresh(STREAM);
    RETURN(OK);
}
CUresult cuStreamDestroy_v2(void *stream) { GONE(STREAM, stream); }
CUresult cuStreamSynchronize(void *stream) { IN_CONTEXT(); ON_STREAM(); RETURN(OK); }
CUresult cuStreamQuery(void *stream) { IN_CONTEXT(); ON_STREAM(); RETURN(OK); }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    IN_CONTEXT();
    ON_STREAM();
    ON_EVENT();
    RETURN(flags ? INVALID_VALUE : OK);
}
CUresult cuStreamWriteValue64_v2(void *stream, CUdeviceptr address, uint64_t value, unsigned flags) {
    IN_CONTEXT();
    ON_STREAM();
    if (flags || address % 8 || !accessible(address, 8, 1)) RETURN(INVALID_VALUE);
    *(volatile uint64_t *)address = value;
    RETURN(OK);
}
CUresult cuStreamWaitValue64_v2(void *stream, CUdeviceptr address, uint64_t value, unsigned flags) {
    IN_CONTEXT();
    ON_STREAM();
    if (flags || address % 8 || !accessible(address, 8, 0)) RETURN(INVALID_VALUE);
    if ((int64_t)(*(volatile uint64_t *)address - value) < 0) misuse("a wait that never ends", __func__);
    RETURN(OK);
}
CUresult cuEventCreate(void **event, unsigned flags) {
    IN_CONTEXT();
    if (flags & ~3u) RETURN(INVALID_VALUE);
    *event = fresh(EVENT);
    RETURN(OK);
}
CUresult cuEventDestroy_v2(void *event) { GONE(EVENT, event); }
CUresult cuEventRecord(void *event, void *stream) { IN_CONTEXT(); ON_STREAM(); ON_EVENT(); RETURN(OK); }
CUresult cuEventQuery(void *event) { IN_CONTEXT(); ON_EVENT(); RETURN(OK); }
CUresult cuEventSynchronize(void *event) { IN_CONTEXT(); ON_EVENT(); RETURN(OK); }
CUresult cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    IN_CONTEXT();
    ON_STREAM();
    function(data);
    RETURN(OK);
}
CUresult cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) {
    IN_CONTEXT();
    (void)options, (void)values;
    if (count || !strstr(image, ".entry ringest_add")) RETURN(INVALID_IMAGE);
    *module = fresh(MODULE);
    RETURN(OK);
}
CUresult cuModuleUnload(void *module) { GONE(MODULE, module); }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    IN_CONTEXT();
    if (!at(MODULE, (uint64_t)module)) RETURN(INVALID_HANDLE);
    if (strcmp(name, "ringest_add")) RETURN(NOT_FOUND);
    *function = module;
    RETURN(OK);
}
CUresult cuFuncLoad(void *function) { IN_CONTEXT(); RETURN(at(MODULE, (uint64_t)function) ? OK : INVALID_HANDLE); }
CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    IN_CONTEXT();
    ON_STREAM();
    if (!at(MODULE, (uint64_t)function) || gx * gy * gz * bx * by * bz != 1 || shared || extra) RETURN(INVALID_VALUE);
    uint64_t address = *(uint64_t *)parameters[0], value = *(uint64_t *)parameters[1];
    if (!accessible(address, 8, 1)) RETURN(700);
    *(uint64_t *)address += value;
    RETURN(OK);
}

typedef struct { unsigned type; union { int fd; struct { void *handle; const void *name; } win32; } handle;
                 unsigned long long size; unsigned flags, reserved[16]; } ExternalMemory;
typedef struct { unsigned long long offset, size; unsigned flags, reserved[16]; } ExternalBuffer;
CUresult cuImportExternalMemory(void **memory, const ExternalMemory *description) {
    IN_CONTEXT();
    // As the real one does, it takes the descriptor even when it fails later.
    close(description->handle.fd);
    if (description->type != 1 || !description->size || description->flags) RETURN(INVALID_VALUE);
    *memory = fresh(EXTERNAL);
    RETURN(OK);
}
CUresult cuExternalMemoryGetMappedBuffer(CUdeviceptr *address, void *memory, const ExternalBuffer *description) {
    IN_CONTEXT();
    if (!at(EXTERNAL, (uint64_t)memory) || description->offset || description->flags) RETURN(INVALID_VALUE);
    void *bytes = malloc(description->size);
    if (!bytes) RETURN(OUT_OF_MEMORY);
    *address = (uint64_t)bytes;
    add(DEVICE, *address, description->size);
    RETURN(OK);
}
CUresult cuDestroyExternalMemory(void *memory) { GONE(EXTERNAL, memory); }
CUresult cuFlushGPUDirectRDMAWrites(unsigned target, unsigned scope) {
    IN_CONTEXT();
    RETURN(target || (scope != 100 && scope != 200) ? INVALID_VALUE : OK);
}
