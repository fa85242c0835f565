// A small fork-join pool: one parallel region at a time, chunks claimed in index order.
#pragma once

#include <cstdint>

namespace specengine {

// Number of threads a region may use, the caller included. Never below 1.
int num_threads();
void set_num_threads(int num_threads);

using RegionTask = void (*)(void* context, int64_t index);

// Runs task(context, 0 … count - 1), each exactly once, and returns when all are done. Which thread
// runs an index is not defined, so tasks must own disjoint outputs. Runs inline when the pool has
// one thread, when `count` is 1, or when another thread is inside a region. Tasks must not throw.
void run_region(int64_t count, RegionTask task, void* context);

// run_region for a callable; `is_parallel` false runs inline, for work too small to share.
template <class Function>
void parallel_for(int64_t count, bool is_parallel, Function&& function) {
  if (!is_parallel || count < 2) {
    for (int64_t index = 0; index < count; ++index) function(index);
    return;
  }
  auto trampoline = [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); };
  run_region(count, trampoline, const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace specengine
