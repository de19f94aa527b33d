// The device header's consumer for the simulator: one thread, storage of the caller.

#include "ringest_device.cuh"

#include <new>

using namespace ringest::device;
using consumer_t = consumer<thread_group>;

static_assert(sizeof(consumer_t) <= 256 && alignof(consumer_t) <= 8, "the caller's storage");
static_assert(sizeof(slot) == 56, "the caller's copy of it");

extern "C" {

void ringest_testing_consumer_make(void* storage, const ringest_io_queue_view* view, uint32_t index) {
    new (storage) consumer_t(*view, index);
}

void ringest_testing_consumer_end(void* storage) { static_cast<consumer_t*>(storage)->~consumer_t(); }

int32_t ringest_testing_try_pop(void* storage, slot* item) {
    return static_cast<int32_t>(static_cast<consumer_t*>(storage)->try_pop(*item));
}

void ringest_testing_release(void* storage, const slot* item) { static_cast<consumer_t*>(storage)->release(*item); }

bool ringest_testing_hand_back(void* storage) { return static_cast<consumer_t*>(storage)->hand_back(); }

int32_t ringest_testing_error(const void* storage) { return static_cast<const consumer_t*>(storage)->error(); }

uint64_t ringest_testing_next(const void* storage) { return static_cast<const consumer_t*>(storage)->next(); }

int32_t ringest_testing_look_at_tail(const ringest_io_queue_view* view, uint64_t n) {
    return static_cast<int32_t>(wait_tail(*view, n, 0, thread_group()));
}

void ringest_testing_abort(const ringest_io_queue_view* view, int32_t error) { ringest::device::abort(*view, error); }

}  // extern "C"
