// Memory of others as the core is given it, and what is asked of the numbers in it before they
// index memory.
#pragma once

#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>

namespace specengine {

using Ints = std::span<const int32_t>;

// A matrix that is used where it lies; elements of a row are beside each other.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t num_rows = 0, width = 0, stride = 0;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// A ValueError in Python. Messages begin with the name of the argument that is wrong.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void check_index(int64_t value, int64_t low, int64_t end, const char* name, int64_t at) {
  if (value < low || value >= end)
    fail(name, ": ", value, " at index ", at, " is outside ", low, " … ", end - 1);
}

template <class T>
void check_range(const T* values, int64_t count, const char* name, int64_t low, int64_t end) {
  for (int64_t i = 0; i < count; ++i) check_index(values[i], low, end, name, i);
}

}  // namespace specengine
