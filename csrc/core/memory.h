// Memory that is read from end to end: streaming it through 2 MiB pages misses no TLB.
#pragma once

#include <cstdint>

namespace specengine {

// From here on memory of its own pays.
constexpr int64_t kLargeBytes = int64_t{1} << 21;
// Zeroed memory of its own, outside the heap, which temporaries would leave full of holes.
// Throws std::bad_alloc.
void* allocate_large(int64_t num_bytes);
void free_large(void* data, int64_t num_bytes);

}  // namespace specengine
