// A decoder's whole forward in one call: the op list of specengine/kernels/types/program.py,
// executed.
#pragma once

#include <mutex>
#include <optional>
#include <variant>
#include <vector>

#include "core/batch.h"
#include "core/ops.h"
#include "core/scratch.h"

namespace specengine {

enum class Register { kHidden, kQuery, kAttended, kResidual, kExpanded, kNumRegisters };

struct NormQkvStep {
  int64_t layer;
  NormWeight norm;
  LinearWeight weight;
  const float* head_norm;  // see KvAppend
};
struct AttentionStep {
  int64_t layer;
};
struct LinearResidualStep {
  Register source;
  LinearWeight weight;
  Register residual;
  Register out;
};
struct NormLinearStep {
  Register source;
  NormWeight norm;
  LinearWeight weight;
  Activation activation;
  Register out;
};
using Step = std::variant<NormQkvStep, AttentionStep, LinearResidualStep, NormLinearStep>;

// Weights are the caller's to keep alive.
struct Program {
  const void* token_table;
  const void* position_table;  // or null
  DType table_dtype;
  const float* rotary;  // [P, 2, rotary_half] or null
  int64_t rotary_half;
  int64_t hidden_size, num_heads, num_kv_heads, head_dim;
  std::vector<Step> steps;
  Head head;
  int64_t num_tokens = 0;             // rows of token_table
  int64_t num_positions = INT32_MAX;  // rows of position_table and rotary
};

// Draws of a draft model in a row, each fed to the next: sequence b feeds its tokens from start[b]
// on and draws limits[b], which are written to `tokens` from seq_len[b] on.
struct DraftCall {
  Matrix<int32_t> tokens;              // [S, P]
  Matrix<const int32_t> block_table;   // [S, M]
  Ints slots, start, seq_len, limits;  // [B]
  void* kv_cache;
  DType kv_dtype;
  int64_t num_blocks, block_size;
  // The same tokens and their error flags, [B, k], k = the most of limits; 0 where nothing is
  // drawn.
  int32_t* drafted;
  int32_t* error;
  int64_t k;
};

class DecoderRunner {
 public:
  explicit DecoderRunner(Program program) : program_(std::move(program)) {}

  // All three fail where a number of the batch points outside. logits: [num_logit_rows,
  // padded_vocab_size]
  void forward(const BatchView& batch, int64_t vocab_size, float* logits,
               int64_t padded_vocab_size);
  // Row r decides the position after token logit_rows[r]. rows: [num_sequences]; tables: what is
  // done to the logits first, or null; tokens, error: [num_logit_rows].
  void draw(const BatchView& batch, int64_t vocab_size, const SamplingRows& rows,
            const TransformTables* tables, int32_t* tokens, int32_t* error);
  void draft(const DraftCall& call, int64_t vocab_size, const SamplingRows& rows,
             const TransformTables* tables);

 private:
  float* at(Register which) { return buffers_[static_cast<int>(which)].reserve(0); }
  void check(const BatchView& batch) const;
  void reserve(const BatchView& batch);
  void run_layers(const BatchView& batch);
  void run(const NormQkvStep& step, const BatchView& batch);
  void run(const AttentionStep& step, const BatchView& batch);
  void run(const LinearResidualStep& step, const BatchView& batch);
  void run(const NormLinearStep& step, const BatchView& batch);
  const float* logit_inputs(const BatchView& batch);
  void draw_rows(const BatchView& batch, int64_t vocab_size, const SamplingRows& rows,
                 const TransformTables* tables, int32_t* tokens, int32_t* error);

  Program program_;
  std::mutex mutex_;  // buffers are shared between calls
  Scratch<float> buffers_[static_cast<int>(Register::kNumRegisters)];
  Scratch<float> gathered_;
  BatchMemory draft_batch_;
  Scratch<int32_t> draft_integers_;
  DecidedRowsBuilder draw_decided_;
  RowTransforms draw_transforms_;
};

}  // namespace specengine
