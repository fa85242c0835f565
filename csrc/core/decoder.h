// A decoder's whole forward in one call: the op list of specengine/kernels/program.py, executed.
#pragma once

#include <mutex>
#include <optional>
#include <variant>
#include <vector>

#include "core/ops.h"
#include "core/scratch.h"

namespace specengine {

enum class Register { kHidden, kQuery, kAttended, kResidual, kExpanded, kNumRegisters };

struct NormQkvStep {
  int64_t layer;
  NormWeight norm;
  LinearWeight weight;
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
  NormWeight final_norm;
  LinearWeight head;
};

// See ForwardBatch in specengine/kernels/program.py; kv_cache is [layers, 2, N, Hkv, block_size,
// head_dim].
struct BatchView {
  int64_t num_tokens, num_sequences;
  const int32_t* token_ids;
  const int32_t* positions;
  const int64_t* kv_slots;
  const int32_t* q_start;
  const int32_t* context_len;
  const int32_t* slots;
  const int32_t* block_table;
  int64_t table_stride;
  const int64_t* logit_rows;
  int64_t num_logit_rows;
  void* kv_cache;
  DType kv_dtype;
  int64_t num_blocks, block_size;
};

class DecoderRunner {
 public:
  explicit DecoderRunner(Program program) : program_(std::move(program)) {}

  const Program& program() const { return program_; }
  // logits: [num_logit_rows, padded_vocab_size]
  void forward(const BatchView& batch, int64_t vocab_size, float* logits,
               int64_t padded_vocab_size);
  // Row r decides the position after token logit_rows[r]. What `by_sequence` says of temperatures,
  // filters and seeds it says of each sequence; its positions are not read.
  void draw(const BatchView& batch, int64_t vocab_size, const DrawRows& by_sequence);

 private:
  float* at(Register which) { return buffers_[static_cast<int>(which)].reserve(0); }
  void reserve(const BatchView& batch);
  void run_layers(const BatchView& batch);
  void run(const NormQkvStep& step, const BatchView& batch);
  void run(const AttentionStep& step, const BatchView& batch);
  void run(const LinearResidualStep& step, const BatchView& batch);
  void run(const NormLinearStep& step, const BatchView& batch);
  const float* logit_inputs(const BatchView& batch);

  Program program_;
  std::mutex mutex_;  // buffers are shared between calls
  Scratch<float> buffers_[static_cast<int>(Register::kNumRegisters)];
  Scratch<float> gathered_;
  Scratch<int32_t> draw_integers_;
  Scratch<float> draw_numbers_;
  Scratch<int64_t> draw_seeds_;
};

}  // namespace specengine
