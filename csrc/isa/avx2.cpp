// The kernels for AVX2 with FMA and F16C.
#include "core/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace specengine {
namespace avx2 {
#include "isa/simd_avx2.h"
constexpr bool kHasTiles = false;
#include "isa/table.h"
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::table("avx2");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
