// Memory that a thread keeps between calls, so that the decode path does not allocate.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "core/memory.h"

namespace specengine {

// A growing buffer, aligned to 64 bytes or more; its contents do not survive growth.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { release(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* reserve(int64_t count) {
    if (count > capacity_) {
      release();
      data_ = static_cast<T*>(is_large(count) ? allocate_large(count * sizeof(T))
                                              : ::operator new(count * sizeof(T), kAlignment));
      capacity_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static bool is_large(int64_t count) {
    return count * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
  }

  void release() {
    T* const data = std::exchange(data_, nullptr);
    const int64_t count = std::exchange(capacity_, 0);
    if (is_large(count)) return free_large(data, count * sizeof(T));
    ::operator delete(data, kAlignment);
  }

  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace specengine
