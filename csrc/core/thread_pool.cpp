#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace specengine {
namespace {

// Long enough to bridge the gap between two ops of a layer, short enough not to starve a busy
// machine.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kMaxThreads = 256;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// `claim_` packs (epoch, chunks left) in one word: a chunk is claimed by one compare-and-swap, and
// a worker that comes late finds nothing left. The region's descriptor cannot change while a
// claimed chunk is unfinished, so it is read only after a successful claim.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    is_stopping_.store(true);
    {
      std::lock_guard lock(sleep_mutex_);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, RegionTask task, void* context) {
    task_ = task;
    context_ = context;
    count_ = count;
    num_done_.store(0, std::memory_order_relaxed);
    ++epoch_;
    claim_.store((uint64_t{epoch_} << 32) | static_cast<uint64_t>(count));
    if (num_sleeping_.load() > 0) {
      {
        std::lock_guard lock(sleep_mutex_);
      }
      wake_.notify_all();
    }
    while (run_one()) {
    }
    for (int spins = 0; num_done_.load(std::memory_order_acquire) != count; ++spins) {
      if (spins < 4000) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  bool has_work() const {
    return static_cast<uint32_t>(claim_.load(std::memory_order_acquire)) != 0;
  }

  bool run_one() {
    uint64_t claim = claim_.load(std::memory_order_acquire);
    do {
      if (static_cast<uint32_t>(claim) == 0) return false;
    } while (!claim_.compare_exchange_weak(claim, claim - 1, std::memory_order_acq_rel));
    task_(context_, count_ - static_cast<int64_t>(static_cast<uint32_t>(claim)));
    num_done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
  }

  void work() {
    while (!is_stopping_.load(std::memory_order_relaxed)) {
      while (run_one()) {
      }
      const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
      while (!has_work() && std::chrono::steady_clock::now() < deadline) {
        for (int i = 0; i < 16 && !has_work(); ++i) relax();
      }
      if (has_work()) continue;
      std::unique_lock lock(sleep_mutex_);
      num_sleeping_.fetch_add(1);
      wake_.wait(lock, [this] { return is_stopping_.load() || claim_has_work(); });
      num_sleeping_.fetch_sub(1);
    }
  }

  bool claim_has_work() const { return static_cast<uint32_t>(claim_.load()) != 0; }

  alignas(64) std::atomic<uint64_t> claim_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  RegionTask task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  uint32_t epoch_ = 0;
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

int default_num_threads() {
  if (const char* text = std::getenv("SPECENGINE_NUM_THREADS")) {
    const int value = std::atoi(text);
    if (value > 0) return std::min(value, kMaxThreads);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
  }
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

// Everything a region needs. After fork() the child has no workers and perhaps a locked mutex: it
// abandons the parent's state and starts anew.
struct PoolState {
  std::mutex region_mutex;
  ThreadPool* pool = nullptr;
  std::atomic<int> wanted{default_num_threads()};
};

std::atomic<PoolState*> g_state{nullptr};

void start_anew_in_child() {
  PoolState* parent = g_state.load();
  if (parent == nullptr) return;
  auto* child = new PoolState;
  child->wanted.store(parent->wanted.load());
  g_state.store(child);
}

PoolState& state() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_state.store(new PoolState);
    pthread_atfork(nullptr, nullptr, start_anew_in_child);
  });
  return *g_state.load();
}

void run_inline(int64_t count, RegionTask task, void* context) {
  for (int64_t index = 0; index < count; ++index) task(context, index);
}

}  // namespace

int num_threads() { return state().wanted.load(); }

void set_num_threads(int num_threads) {
  state().wanted.store(std::clamp(num_threads, 1, kMaxThreads));
}

void run_region(int64_t count, RegionTask task, void* context) {
  PoolState& current = state();
  const int wanted = current.wanted.load(std::memory_order_relaxed);
  if (wanted == 1 || count < 2 || count > INT32_MAX) return run_inline(count, task, context);
  std::unique_lock lock(current.region_mutex, std::try_to_lock);
  if (!lock.owns_lock()) return run_inline(count, task, context);
  if (current.pool == nullptr || current.pool->num_threads() != wanted) {
    delete current.pool;
    current.pool = new ThreadPool(wanted);
  }
  current.pool->run(count, task, context);
}

}  // namespace specengine
