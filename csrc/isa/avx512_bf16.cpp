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
//
#include "isa/simd_avx512_vnni.h"
//
#include "isa/simd_avx512_bf16.h"
constexpr bool kHasTiles = false;
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
