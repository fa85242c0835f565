// Memory that a thread keeps between calls, so that the decode path does not allocate.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace specengine {

// A growing, 64-byte aligned buffer; its contents do not survive growth.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > capacity_) {
      data_.reset(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t{64})));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace specengine
