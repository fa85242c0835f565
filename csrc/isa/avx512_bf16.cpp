// The kernels for AVX-512 with VNNI and BF16: bf16 weights meet activations rounded to bf16.
#include "core/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                              \
    __attribute__((target(                                                                                 \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace specengine {
namespace avx512_bf16 {
#include "isa/simd_avx512.h"

constexpr bool kHasBf16Dot = true;
constexpr bool kHasOffsetDot = true;
inline U16 dot_int8(U16 sum, U16 offset_weights, U16 x) {  // in place: see simd_avx2.h
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(offset_weights.v), "v"(x.v));
  return sum;
}
// See simd_avx2.h.
template <int kBits>
struct CodeSum {
  static constexpr int kMaxSums = 8;
  U16 sum;
  void start(uint32_t start) { sum = set1_u(start); }
  void add(U16 codes, U16 x) { sum = dot_int8(sum, codes, x); }
  U16 total(uint32_t) const { return sum; }
};
inline F16 dot_bf16(F16 sum, U16 a, U16 b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

#include "isa/table.h"
}  // namespace avx512_bf16

const Kernels kAvx512Bf16Kernels = avx512_bf16::table("avx512_bf16");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
