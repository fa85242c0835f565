#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/views.h"

namespace specengine {
namespace {

// Long enough to bridge the gap between two ops of a layer, short enough not to starve a busy
// machine.
constexpr auto kSpinTime = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// `claim_` packs (epoch, chunks left) in one word: a chunk is claimed by one compare-and-swap, and
// a worker that comes late finds nothing left. The region's descriptor cannot change while a
// claimed chunk is unfinished, so it is read only after a successful claim.
class ThreadPool {
 public:
  // Throws std::system_error where the system has no more threads.
  explicit ThreadPool(int num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ~ThreadPool() { stop(); }

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
  void stop() {
    is_stopping_.store(true);
    {
      std::lock_guard lock(sleep_mutex_);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

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

namespace {

// Which process this is, among those that fork() made of the first: a child has none of the threads
// that its parent had, and what they held they hold for ever.
std::atomic<uint32_t> g_process{1};
// Threads inside regions, of all engines.
std::atomic<int> g_num_busy{0};
thread_local Threads* t_in_use = nullptr;

[[maybe_unused]] const int kIsWatchingForks = pthread_atfork(nullptr, nullptr, [] {
  g_process.fetch_add(1);
  g_num_busy.store(0);
});

int num_processors() {
  static const int count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return count;
}

void run_inline(int64_t count, RegionTask task, void* context) {
  for (int64_t index = 0; index < count; ++index) task(context, index);
}

}  // namespace

// What a parent's threads left behind is not touched.
Threads::~Threads() {
  if (pool_process_ == g_process.load()) delete pool_;
}

void Threads::set_count(int64_t count) {
  if (count < 1 || count > kMaxThreads)
    fail("num_threads: ", count, " is outside 1 … ", kMaxThreads);
  count_.store(static_cast<int>(count));
}

// Engines that work at the same time share the processors: whoever finds too few left waits for
// nobody. One engine alone gets what it asks for.
bool Threads::begin(int count) {
  const uint32_t process = g_process.load(std::memory_order_relaxed);
  uint32_t running = running_.load(std::memory_order_relaxed);
  if (running == process || !running_.compare_exchange_strong(running, process)) return false;
  int busy = g_num_busy.load(std::memory_order_relaxed);
  do {
    if (busy > 0 && busy + count > num_processors()) {
      running_.store(0);
      return false;
    }
  } while (!g_num_busy.compare_exchange_weak(busy, busy + count));
  if (pool_process_ != process) pool_ = nullptr;
  pool_process_ = process;
  return true;
}

struct Threads::Region {
  Threads& threads;
  int count;
  ~Region() {
    g_num_busy.fetch_sub(count);
    threads.running_.store(0);
  }
};

void Threads::run(int64_t count, RegionTask task, void* context) {
  const int wanted = this->count();
  if (wanted == 1 || count < 2 || count > INT32_MAX || !begin(wanted))
    return run_inline(count, task, context);
  const Region region{*this, wanted};
  if (pool_ == nullptr || pool_->num_threads() != wanted) {
    delete std::exchange(pool_, nullptr);
    pool_ = new ThreadPool(wanted);
  }
  pool_->run(count, task, context);
}

ThreadsInUse::ThreadsInUse(Threads& threads) : outer_(t_in_use) { t_in_use = &threads; }
ThreadsInUse::~ThreadsInUse() { t_in_use = outer_; }

int num_threads() { return t_in_use == nullptr ? 1 : t_in_use->count(); }

void run_region(int64_t count, RegionTask task, void* context) {
  if (t_in_use == nullptr) return run_inline(count, task, context);
  t_in_use->run(count, task, context);
}

}  // namespace specengine
