// The kernels for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

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
#include "simd_avx512.h"

constexpr bool kHasBf16Dot = false;
inline U16 dot_int16(U16 sum, U16 a, U16 b) {  // in place: see simd_avx2.h
  asm volatile("vpaddd %1, %0, %0" : "+v"(sum.v) : "v"(_mm512_madd_epi16(a.v, b.v)));
  return sum;
}
inline F16 dot_bf16(F16 sum, U16, U16) { return sum; }

#include "isa_table.h"
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::table("avx512");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
