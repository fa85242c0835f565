#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

namespace specengine {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

uintptr_t round_up(uintptr_t value) { return (value + kHugePage - 1) & ~(kHugePage - 1); }

}  // namespace

void* allocate_large(int64_t num_bytes) {
#if defined(__linux__)
  // Too much, so that a page boundary lies inside; what is outside of it is given back.
  const uintptr_t size = num_bytes + kHugePage;
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const auto first = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t begin = round_up(first);
  constexpr uintptr_t kPage = 4096;
  const uintptr_t end = (begin + num_bytes + kPage - 1) & ~(kPage - 1);
  if (begin > first) munmap(mapped, begin - first);
  if (first + size > end) munmap(reinterpret_cast<void*>(end), first + size - end);
  const uintptr_t whole = num_bytes & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), whole, MADV_HUGEPAGE);  // where the system has them
  return reinterpret_cast<void*>(begin);
#else
  return ::operator new(num_bytes, std::align_val_t{64});
#endif
}

void free_large(void* data, int64_t num_bytes) {
#if defined(__linux__)
  munmap(data, num_bytes);
#else
  (void)num_bytes;
  ::operator delete(data, std::align_val_t{64});
#endif
}

}  // namespace specengine
