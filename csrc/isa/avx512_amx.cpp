// The kernels for AVX-512 with VNNI and BF16, and tiles (AMX) of bf16 and int8.
#include "core/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/tile_config.h"

#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((                                                                        \
        target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni," \
               "avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))),                        \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 in its own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace specengine {
namespace avx512_amx {
#include "isa/simd_avx512.h"
//
#include "isa/simd_avx512_vnni.h"
//
#include "isa/simd_avx512_bf16.h"
//
#include "isa/tiles_amx.h"
constexpr bool kHasTiles = true;
#include "isa/table.h"
//
#include "isa/tiles.h"
}  // namespace avx512_amx

const Kernels kAvx512AmxKernels = avx512_amx::tile_table("avx512_amx");
}  // namespace specengine

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
