// What is judged, by which law it was drawn, and what was decided: specengine/kernels/types/
// drafts.py. B sequences.
#pragma once

#include <cstdint>

#include "core/rows.h"
#include "core/views.h"

namespace specengine {

// specengine/kernels/types/rules.py.
enum Rule : int32_t { kRuleMatch, kRuleRejection, kRuleBlock, kRuleThreshold, kRuleTypical };

// Without logits there is none: every draft is a point mass.
struct DraftLaw {
  const float* log_probs = nullptr;  // [B, k], dense
  const float* logits = nullptr;     // [B, k, vocab]
  int64_t sequence_stride = 0, row_stride = 0, vocab = 0;
  const float* stats = nullptr;   // [B, k, 4], dense
  const bool* has_law = nullptr;  // [B], or null: all sequences have it

  bool is_of(int64_t b) const { return logits != nullptr && (has_law == nullptr || has_law[b]); }
};

struct Drafts {
  Ints row_start, seq_len, num_draft;  // [B]
  Matrix<const int32_t> tokens;        // [B, k]
  DraftLaw law;

  int64_t count() const { return static_cast<int64_t>(row_start.size()); }
  // The rule that judges a sequence which asks for `rule`.
  int32_t rule_of(int64_t b, int32_t rule) const { return num_draft[b] > 0 ? rule : kRuleMatch; }
};

struct Verdict {
  Matrix<int32_t> tokens;  // [B, k + 1]
  int32_t* num_accepted;   // [B]
  int32_t* error;          // [B]
};

}  // namespace specengine
