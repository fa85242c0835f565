// The kernels for AVX-512 (F, BW, DQ, VL).
#include "core/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace specengine {
namespace avx512 {
#include "isa/simd_avx512.h"

constexpr bool kHasTiles = false;
constexpr bool kHasBf16Dot = false;
constexpr bool kHasOffsetDot = false;
inline U16 dot_int8(U16 sum, U16 offset_weights, U16 x) {  // see simd_avx2.h
  const __m512i w = _mm512_xor_si512(offset_weights.v, _mm512_set1_epi8(-128));
  const __m512i signed_x =
      _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x.v);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
  const __m512i products = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  asm volatile("vpaddd %1, %0, %0" : "+v"(sum.v) : "v"(products));
  return sum;
}
// See simd_avx2.h.
struct NibbleSum {
  static constexpr int kMaxSums = 8;
  __m512i v;
  void begin(U16 codes, U16 x) { v = _mm512_maddubs_epi16(codes.v, x.v); }
  void add(U16 codes, U16 x) {
    const __m512i products = _mm512_maddubs_epi16(codes.v, x.v);
    asm volatile("vpaddw %1, %0, %0" : "+v"(v) : "v"(products));
  }
  U16 total() const { return {_mm512_madd_epi16(v, _mm512_set1_epi16(1))}; }
};
struct PairSum {
  static constexpr int kMaxSums = 8;
  __m512i v;
  void start(uint32_t start) { v = _mm512_set1_epi32(static_cast<int>(start)); }
  void add(U16 a, U16 b) {
    const __m512i products = _mm512_madd_epi16(a.v, b.v);
    asm volatile("vpaddd %1, %0, %0" : "+v"(v) : "v"(products));
  }
  U16 total() const { return {v}; }
};
#include "isa/nibble_sums.h"
inline F16 dot_bf16(F16 sum, U16, U16) { return sum; }

#include "isa/table.h"
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::table("avx512");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
