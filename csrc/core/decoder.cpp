#include "core/decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace specengine {

// Every register that a step writes, as wide as its widest writer; a buffer never moves within a
// call.
void DecoderRunner::reserve(const BatchView& batch) {
  int64_t width[static_cast<int>(Register::kNumRegisters)] = {};
  const auto widen = [&](Register which, int64_t columns) {
    auto& known = width[static_cast<int>(which)];
    known = std::max(known, columns);
  };
  widen(Register::kHidden, program_.hidden_size);
  widen(Register::kQuery, program_.num_heads * program_.head_dim);
  widen(Register::kAttended, program_.num_heads * program_.head_dim);
  for (const Step& step : program_.steps) {
    if (const auto* linear = std::get_if<LinearResidualStep>(&step)) {
      widen(linear->out, linear->weight.out_features);
    } else if (const auto* linear = std::get_if<NormLinearStep>(&step)) {
      widen(linear->out, linear->weight.out_features);
    }
  }
  for (size_t i = 0; i < std::size(width); ++i) buffers_[i].reserve(batch.num_tokens * width[i]);
}

void DecoderRunner::run(const NormQkvStep& step, const BatchView& batch) {
  const int64_t layer_bytes = 2 * batch.num_blocks * program_.num_kv_heads * batch.block_size *
                              program_.head_dim * element_size(batch.kv_dtype);
  const KvAppend append{batch.positions,
                        batch.kv_slots,
                        static_cast<char*>(batch.kv_cache) + step.layer * layer_bytes,
                        batch.kv_dtype,
                        batch.num_blocks,
                        program_.num_kv_heads,
                        batch.block_size,
                        program_.head_dim,
                        program_.rotary,
                        program_.rotary_half};
  norm_qkv(at(Register::kHidden), batch.num_tokens, step.norm, step.weight, append,
           at(Register::kQuery));
}

void DecoderRunner::run(const AttentionStep& step, const BatchView& batch) {
  const int64_t layer_bytes = 2 * batch.num_blocks * program_.num_kv_heads * batch.block_size *
                              program_.head_dim * element_size(batch.kv_dtype);
  const AttentionArgs args{
      at(Register::kQuery), static_cast<const char*>(batch.kv_cache) + step.layer * layer_bytes,
      batch.kv_dtype,       batch.block_table,
      batch.table_stride,   batch.slots,
      batch.q_start,        batch.context_len,
      program_.num_heads,   program_.num_kv_heads,
      program_.head_dim,    batch.num_blocks,
      batch.block_size,     at(Register::kAttended)};
  paged_attention(args, batch.num_sequences);
}

void DecoderRunner::run(const LinearResidualStep& step, const BatchView& batch) {
  const int64_t width = step.weight.out_features;
  linear({at(step.source), batch.num_tokens, nullptr, &step.weight, Activation::kNone,
          at(step.residual), at(step.out), width, width});
}

void DecoderRunner::run(const NormLinearStep& step, const BatchView& batch) {
  const int64_t width = step.weight.out_features;
  linear({at(step.source), batch.num_tokens, &step.norm, &step.weight, step.activation, nullptr,
          at(step.out), width, width});
}

void DecoderRunner::run_layers(const BatchView& batch) {
  reserve(batch);
  embed(batch.token_ids, batch.positions, batch.num_tokens, program_.hidden_size,
        program_.token_table, program_.position_table, program_.table_dtype, at(Register::kHidden));
  for (const Step& step : program_.steps) {
    std::visit([&](const auto& concrete) { run(concrete, batch); }, step);
  }
}

const float* DecoderRunner::logit_inputs(const BatchView& batch) {
  const int64_t width = program_.hidden_size;
  const float* hidden = at(Register::kHidden);
  if (batch.num_logit_rows == batch.num_tokens) return hidden;
  float* rows = gathered_.reserve(batch.num_logit_rows * width);
  for (int64_t r = 0; r < batch.num_logit_rows; ++r) {
    std::memcpy(rows + r * width, hidden + batch.logit_rows[r] * width, sizeof(float) * width);
  }
  return rows;
}

void DecoderRunner::forward(const BatchView& batch, int64_t vocab_size, float* logits,
                            int64_t padded_vocab_size) {
  const std::lock_guard lock(mutex_);
  run_layers(batch);
  if (batch.num_logit_rows == 0) return;
  head(logit_inputs(batch), batch.num_logit_rows, program_.final_norm, program_.head, vocab_size,
       logits, padded_vocab_size);
}

void DecoderRunner::draw(const BatchView& batch, int64_t vocab_size, const DrawRows& by_sequence) {
  const std::lock_guard lock(mutex_);
  run_layers(batch);
  const int64_t num_rows = batch.num_logit_rows;
  if (num_rows == 0) return;
  int32_t* positions = draw_integers_.reserve(2 * num_rows);
  int32_t* top_k = positions + num_rows;
  float* temperature = draw_numbers_.reserve(3 * num_rows);
  float* top_p = temperature + num_rows;
  float* min_p = top_p + num_rows;
  int64_t* seeds = draw_seeds_.reserve(num_rows);
  const int32_t* ends = batch.q_start + 1;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t token = batch.logit_rows[r];
    const int64_t owner = std::upper_bound(ends, ends + batch.num_sequences, token) - ends;
    positions[r] = batch.positions[token] + 1;
    temperature[r] = by_sequence.temperature[owner];
    top_k[r] = by_sequence.top_k[owner];
    top_p[r] = by_sequence.top_p[owner];
    min_p[r] = by_sequence.min_p[owner];
    seeds[r] = by_sequence.seeds[owner];
  }
  head_draw(
      logit_inputs(batch), num_rows, program_.final_norm, program_.head, vocab_size,
      {temperature, top_k, top_p, min_p, seeds, positions, by_sequence.tokens, by_sequence.error});
}

}  // namespace specengine
