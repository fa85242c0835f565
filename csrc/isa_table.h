// Everything an instruction set has. Included inside its namespace, after its simd_*.h.
#include "isa_math.h"
//
#include "isa_attention.h"
#include "isa_linear.h"
#include "isa_rows.h"
