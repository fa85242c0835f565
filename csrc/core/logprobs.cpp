#include <algorithm>
#include <cmath>
#include <limits>

#include "core/ops.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

constexpr int64_t kMinParallelLogits = 8192;

float sanitised(float z) {
  if (std::isnan(z)) return -std::numeric_limits<float>::infinity();
  return std::isinf(z) && z > 0 ? 3e38f : z;
}

// Ids of the `num_top` largest values, ties to the lowest id: one pass with a short sorted list.
// Most stretches of the row hold nothing above the list's last value, which a branch-free test
// sees.
void largest_ids(const float* logits, int64_t vocab, int64_t num_top, int32_t* ids) {
  constexpr int64_t kStretch = 64;
  int64_t count = 0;
  float last = 0.0f;
  for (int64_t begin = 0; begin < vocab; begin += kStretch) {
    const int64_t end = std::min(vocab, begin + kStretch);
    if (count == num_top) {
      int num_above = 0;
      for (int64_t v = begin; v < end; ++v) num_above += logits[v] > last ? 1 : 0;
      if (num_above == 0) continue;
    }
    for (int64_t v = begin; v < end; ++v) {
      const float value = sanitised(logits[v]);
      if (count == num_top && !(value > last)) continue;
      int64_t at = count < num_top ? count++ : count - 1;
      for (; at > 0 && value > sanitised(logits[ids[at - 1]]); --at) ids[at] = ids[at - 1];
      ids[at] = static_cast<int32_t>(v);
      last = sanitised(logits[ids[count - 1]]);
    }
  }
}

}  // namespace

void token_logprobs(const LogitRows& logits, const int32_t* token_ids, int64_t num_top,
                    float* log_probs, int32_t* top_ids, float* top_log_probs) {
  const Kernels& isa = kernels();
  parallel_for(
      logits.num_rows, logits.num_rows * logits.vocab >= kMinParallelLogits, [&](int64_t r) {
        const float* row = logits.row(r);
        const RowView view{row, logits.vocab, 1.0f, -std::numeric_limits<float>::infinity(), 0.0f};
        const float maximum = isa.row_maximum(view).value;
        float log_normaliser = maximum;
        if (std::isfinite(maximum)) {
          log_normaliser = static_cast<float>(maximum + std::log(isa.row_sum_exp(view, maximum)));
        }
        log_probs[r] = sanitised(row[token_ids[r]]) - log_normaliser;
        if (num_top == 0) return;
        int32_t* ids = top_ids + r * num_top;
        largest_ids(row, logits.vocab, num_top, ids);
        for (int64_t i = 0; i < num_top; ++i) {
          top_log_probs[r * num_top + i] = sanitised(row[ids[i]]) - log_normaliser;
        }
      });
}

}  // namespace specengine
