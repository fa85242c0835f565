// Everything an instruction set has. Included inside its namespace, after its simd_*.h.
#include "isa/math.h"
//
#include "isa/attention.h"
#include "isa/grouped.h"
#include "isa/linear.h"
#include "isa/rows.h"

constexpr Kernels table(const char* name) {
  return {
      name,          kMinGroupRows,   norm_row,         row_layout,
      pack_row,      linear_panels,   attention,        row_maximum,
      row_sum_exp,   row_entropy,     row_group_maxima, row_collect,
      row_mass_bins, row_collect_bin, row_argmax,       race,
      residual_mass, draw_tile,       vocabulary_bits,  read_block,
  };
}
