// The products of AVX-512 with VNNI. Included after simd_avx512.h.

constexpr bool kHasOffsetDot = true;
inline U16 dot_int8(U16 sum, U16 offset_weights, U16 x) {  // in place: see simd_avx2.h
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(offset_weights.v), "v"(x.v));
  return sum;
}
// See simd_avx2.h.
#include "isa/byte_digits.h"
template <int kBits>
struct CodeSum : ByteDigits {
  static constexpr int kMaxSums = 8;
  U16 sum;
  void begin(uint32_t start, U16 codes, U16 x) {
    sum = set1_u(start);
    add(codes, x);
  }
  void add(U16 codes, U16 x) { sum = dot_int8(sum, codes, x); }
  U16 total(uint32_t) const { return sum; }
};
