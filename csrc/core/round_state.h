// The bookkeeping of a speculative round on numbers that rounds hand on: what is fed, staged,
// matched and committed. Meanings are those of specengine.kernels.reference. B sequences, each in a
// slot of S. Every number that indexes memory is checked before anything is written: `fail`.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/drafts.h"
#include "core/views.h"

namespace specengine {

struct RoundPlan {
  int32_t *length, *is_running, *num_draft, *last_position;  // [B]
  int32_t *draft_start, *draft_q_len, *is_drafting;          // [k, B]
};
// slots: [B]; the next three: [S]
void plan_round(Ints slots, Ints seq_len, Ints length_limit, Ints num_speculative, int64_t k,
                int64_t draft_positions, const RoundPlan& plan);

// Rows of floats that go into one column of a [B, k, ...] tensor.
struct KeptRows {
  const float* source;
  int64_t source_stride;
  float* target;
  int64_t target_stride, width;
};

struct StageCall {
  int64_t step;
  Matrix<int32_t> tokens;            // [S, P], written
  Ints slots, seq_len, is_drafting;  // [B]
  Ints drawn;                        // [R], of those that draft, in order
  const int32_t* drawn_error;        // [R], or null: `stats` says it
  Matrix<const float> stats;         // [R, kNumStats]
  Matrix<int32_t> draft_tokens;      // [B, k], written
  int32_t* num_draft;                // [B], lowered where the draw failed
  std::vector<KeptRows> kept;        // R rows each
};
void stage_draft(const StageCall& call);

struct MatchCall {
  Ints drawn, drawn_error;  // [R]
  const Drafts& drafts;
  const SamplingRows& rows;  // [B]
  Ints is_running;           // [B]
  std::optional<float> forced_acceptance;
  Verdict verdict;
};
void match_draws(const MatchCall& call);

// Columns of a round's record before the emitted tokens.
enum ResultColumn { kResultEmitted, kResultDrafted, kResultError, kNumResultColumns };

struct CommitCall {
  Matrix<int32_t> tokens;                                         // [S, P], written
  int32_t *seq_len, *length_limit;                                // [S], written
  Ints slots, start, is_running, num_accepted, num_draft, error;  // [B]
  Matrix<const int32_t> emitted;                                  // [B, k + 1]
  int32_t* record;  // [B, kNumResultColumns + k + 1], dense, written
};
void commit_round(const CommitCall& call);

}  // namespace specengine
