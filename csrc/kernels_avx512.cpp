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
//
#include "isa_table.h"
}  // namespace avx512

const Kernels kAvx512Kernels = {
    "avx512",
    avx512::layer_norm,
    avx512::linear_panel,
    avx512::attention,
    avx512::row_maximum,
    avx512::row_sum_exp,
    avx512::row_group_maxima,
    avx512::row_collect,
    avx512::row_mass_bins,
    avx512::row_collect_bin,
    avx512::row_argmax,
    avx512::race,
    avx512::draw_tile,
    avx512::vocabulary_bits,
    avx512::read_block,
};
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
