// The kernels for any processor.
#include "core/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a translation unit
#endif

namespace specengine {
namespace portable {
#include "isa/simd_portable.h"
constexpr bool kHasTiles = false;
#include "isa/table.h"
}  // namespace portable

const Kernels kPortableKernels = portable::table("portable");
}  // namespace specengine
