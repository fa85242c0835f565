// A round in one call, where draws decide everything: what is fed, the drafts, the target's draws,
// what of the drafts they match, and the commit. Each part is the op of that name.
#pragma once

#include <cstdint>
#include <optional>

#include "core/batch.h"
#include "core/decoder.h"
#include "core/round_state.h"
#include "core/rows.h"
#include "core/scratch.h"
#include "core/transforms.h"

namespace specengine {

// A model, the keys and values that it writes, and the ids that it may emit.
struct RoundModel {
  DecoderRunner* runner;
  void* kv_cache;
  DType kv_dtype;
  int64_t num_blocks, block_size;
  int64_t vocab_size;
};

// B sequences in slots of S.
struct RoundCall {
  Matrix<int32_t> tokens;             // [S, P]
  Matrix<const int32_t> block_table;  // [S, M]
  int32_t *seq_len, *length_limit;    // [S]
  Ints num_speculative;               // [S]
  Ints slots;                         // [B]
  SamplingRows rows;                  // [B]
  const TransformTables* transforms;  // what is done to the logits first, or null
  std::optional<float> forced_acceptance;
  RoundModel target;
  const RoundModel* draft;      // draws the drafts; null: they are given, or there are none
  int64_t num_fed;              // the last committed tokens, 1 or 2, that its first forward feeds
  Matrix<const int32_t> given;  // [B, k]
  Ints num_given;               // [B]
  int64_t k, draft_positions;
};

// Valid until the next round. Parts in seconds.
struct RoundRecord {
  const int32_t* rows;           // [B, width], of `commit_round`
  Matrix<const int32_t> drafts;  // [B, width - kNumResultColumns - 1], what was judged
  int64_t width;
  double draft_seconds, verify_seconds, commit_seconds;
};

// Whether a round of them has ended a sequence, as far as can be told without its text: by one of
// these tokens, by its length, or because its logits were no distribution.
bool has_ended(const RoundCall& call, const RoundRecord& record, Ints stop_ids);

// Memory for rounds, one after the other.
class RoundMemory {
 public:
  RoundRecord run(const RoundCall& call);

 private:
  struct Drafted {
    Matrix<const int32_t> tokens;  // [B, the most that anybody has]
    int32_t* count;                // [B]
  };
  RoundPlan plan(const RoundCall& call);
  Drafted draft(const RoundCall& call, const RoundPlan& plan);
  Drafted take_given(const RoundCall& call, const RoundPlan& plan);

  Scratch<int32_t> plan_, drafts_, judged_, drawn_, record_;
  BatchMemory batch_;
};

}  // namespace specengine
