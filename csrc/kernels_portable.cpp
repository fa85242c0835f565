// The kernels for any processor.
#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a translation unit
#endif

namespace specengine {
namespace portable {
#include "simd_portable.h"
//
#include "isa_table.h"
}  // namespace portable

const Kernels kPortableKernels = {
    "portable",
    portable::layer_norm,
    portable::linear_panel,
    portable::attention,
    portable::row_maximum,
    portable::row_sum_exp,
    portable::row_group_maxima,
    portable::row_collect,
    portable::row_mass_bins,
    portable::row_collect_bin,
    portable::row_argmax,
    portable::race,
    portable::draw_tile,
    portable::vocabulary_bits,
    portable::read_block,
};
}  // namespace specengine
