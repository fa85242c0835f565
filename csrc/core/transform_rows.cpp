#include <algorithm>
#include <cstring>

#include "core/ops.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// Logits below which threads cost more than they save.
constexpr int64_t kMinParallelLogits = 65536;

}  // namespace

void transform_rows(const LogitRows& logits, const SamplingRows& rows,
                    const TransformTables& tables, const RaggedRows& ragged, float* out) {
  static thread_local DecidedRowsBuilder decided;
  static thread_local RowTransforms transforms;
  const RowTransform* asked =
      transforms.build(tables, decided.build(ragged, logits.num_rows, rows), logits.vocab);
  parallel_for(logits.num_rows, logits.num_rows * logits.vocab >= kMinParallelLogits,
               [&](int64_t r) {
                 float* row = out + r * logits.vocab;
                 std::memcpy(row, logits.row(r), sizeof(float) * logits.vocab);
                 asked[r].apply(0, logits.vocab, row);
               });
}

}  // namespace specengine
