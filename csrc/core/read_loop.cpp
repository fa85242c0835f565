#include <algorithm>
#include <atomic>

#include "core/ops.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

constexpr int64_t kTaskBytes = int64_t{1} << 21;

}  // namespace

uint64_t read_all(const void* data, int64_t num_bytes) {
  const auto* bytes = static_cast<const char*>(data);
  std::atomic<uint64_t> total{0};
  const Kernels& isa = kernels();
  parallel_for((num_bytes + kTaskBytes - 1) / kTaskBytes, true, [&](int64_t task) {
    const char* begin = bytes + task * kTaskBytes;
    const int64_t count = std::min(kTaskBytes, num_bytes - task * kTaskBytes);
    total.fetch_add(isa.read_block(begin, count), std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace specengine
