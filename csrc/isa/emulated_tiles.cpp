// The kernels of avx512_amx on a model of its tiles, for tests on any processor.
#include "core/kernels.h"
#include "core/tile_config.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a translation unit
#endif

namespace specengine {
namespace emulated_tiles {
#include "isa/simd_portable.h"
//
#include "isa/tiles_emulated.h"
constexpr bool kHasTiles = true;
#include "isa/table.h"
//
#include "isa/tiles.h"
}  // namespace emulated_tiles

const Kernels kEmulatedTilesKernels = emulated_tiles::tile_table("emulated_tiles");
}  // namespace specengine
