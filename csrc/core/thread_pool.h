// Fork-join regions on an engine's own threads; chunks are claimed in index order.
#pragma once

#include <atomic>
#include <cstdint>

namespace specengine {

constexpr int kMaxThreads = 1024;
class ThreadPool;

using RegionTask = void (*)(void* context, int64_t index);

// How many threads an engine's ops may use, the caller included, and the pool behind them, which
// starts with the first region that needs it. Survives fork(): a child starts a pool of its own.
class Threads {
 public:
  // Throws std::invalid_argument outside 1 … kMaxThreads, as set_count does.
  explicit Threads(int64_t count) { set_count(count); }
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return count_.load(std::memory_order_relaxed); }
  void set_count(int64_t count);

  // See run_region.
  void run(int64_t count, RegionTask task, void* context);

 private:
  struct Region;
  bool begin(int count);

  std::atomic<int> count_{1};
  std::atomic<uint32_t> running_{0};  // the process (a generation) that is inside a region, or 0
  ThreadPool* pool_ = nullptr;        // of whoever is inside a region
  uint32_t pool_process_ = 0;
};

// The threads that regions of this thread use while the object lives. Without one they run inline.
class ThreadsInUse {
 public:
  explicit ThreadsInUse(Threads& threads);
  ~ThreadsInUse();
  ThreadsInUse(const ThreadsInUse&) = delete;
  ThreadsInUse& operator=(const ThreadsInUse&) = delete;

 private:
  Threads* outer_;
};

// Of the threads in use. Never below 1.
int num_threads();

// Runs task(context, 0 … count - 1), each exactly once, and returns when all are done. Which thread
// runs an index is not defined, so tasks must own disjoint outputs. Runs inline when there is one
// thread, when `count` is 1, when the same threads are inside a region, and when regions of other
// engines leave too few processors. Tasks must not throw.
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
