// The kernels for AVX-512 with VNNI.
#include "core/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target(                                                                      \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace specengine {
namespace avx512_vnni {
#include "isa/simd_avx512.h"
//
#include "isa/simd_avx512_vnni.h"
constexpr bool kHasTiles = false;
constexpr bool kHasBf16Dot = false;
inline F16 dot_bf16(F16 sum, U16, U16) { return sum; }

#include "isa/table.h"
}  // namespace avx512_vnni

const Kernels kAvx512VnniKernels = avx512_vnni::table("avx512_vnni");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
