#include "core/decoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace specengine {

void DecoderRunner::check(const BatchView& batch) const {
  check_range(batch.token_ids, batch.num_tokens, "token_ids", 0, program_.num_tokens);
  check_range(batch.positions, batch.num_tokens, "positions", 0, program_.num_positions);
  check_range(batch.kv_slots, batch.num_tokens, "kv_slots", -1,
              batch.num_blocks * batch.block_size);
  check_range(batch.logit_rows, batch.num_logit_rows, "logit_rows", 0, batch.num_tokens);
  check_ragged(batch.num_sequences, batch.q_start, batch.context_len, batch.slots,
               batch.block_table, batch.num_tokens, batch.num_blocks, batch.block_size);
}

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
      widen(linear->out, activated_columns(linear->weight.out_features, linear->activation));
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
                        program_.rotary_half,
                        step.head_norm};
  norm_qkv(at(Register::kHidden), batch.num_tokens, step.norm, step.weight, append,
           at(Register::kQuery));
}

void DecoderRunner::run(const AttentionStep& step, const BatchView& batch) {
  const int64_t layer_bytes = 2 * batch.num_blocks * program_.num_kv_heads * batch.block_size *
                              program_.head_dim * element_size(batch.kv_dtype);
  const AttentionArgs args{at(Register::kQuery),
                           static_cast<const char*>(batch.kv_cache) + step.layer * layer_bytes,
                           batch.kv_dtype,
                           batch.block_table.data,
                           batch.block_table.stride,
                           batch.slots,
                           batch.q_start,
                           batch.context_len,
                           program_.num_heads,
                           program_.num_kv_heads,
                           program_.head_dim,
                           batch.num_blocks,
                           batch.block_size,
                           at(Register::kAttended)};
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
          at(step.out), activated_columns(width, step.activation), width});
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
  check(batch);
  const std::lock_guard lock(mutex_);
  run_layers(batch);
  if (batch.num_logit_rows == 0) return;
  head(logit_inputs(batch), batch.num_logit_rows, program_.head, vocab_size, logits,
       padded_vocab_size);
}

void DecoderRunner::draw(const BatchView& batch, int64_t vocab_size, const SamplingRows& rows,
                         const TransformTables* tables, int32_t* tokens, int32_t* error) {
  const std::lock_guard lock(mutex_);
  draw_rows(batch, vocab_size, rows, tables, tokens, error);
}

void DecoderRunner::draw_rows(const BatchView& batch, int64_t vocab_size, const SamplingRows& rows,
                              const TransformTables* tables, int32_t* tokens, int32_t* error) {
  check(batch);
  run_layers(batch);
  const int64_t num_rows = batch.num_logit_rows;
  if (num_rows == 0) return;
  const RaggedRows ragged{batch.num_sequences, batch.slots, batch.q_start, batch.positions,
                          batch.logit_rows};
  const DecidedRows decided = draw_decided_.build(ragged, num_rows, rows);
  const RowTransform* transforms =
      tables == nullptr ? nullptr : draw_transforms_.build(*tables, decided, vocab_size);
  head_draw(logit_inputs(batch), num_rows, program_.head, vocab_size,
            {decided.rows, decided.positions, tokens, error, transforms});
}

// A sequence whose draws are made stays in the batch and feeds nothing.
void DecoderRunner::draft(const DraftCall& call, int64_t vocab_size, const SamplingRows& rows,
                          const TransformTables* tables) {
  const std::lock_guard lock(mutex_);
  const auto count = static_cast<int64_t>(call.slots.size());
  for (int64_t b = 0; b < count; ++b) {
    const int64_t width = call.tokens.width, length = call.seq_len[b];
    if (call.limits[b] > 0 && length + call.limits[b] > width)
      fail("limits: token ", std::max(length, width), " does not fit ", width);
  }
  int32_t* start = draft_integers_.reserve(5 * count);
  int32_t *q_len = start + count, *num_logits = q_len + count;
  int32_t *drawn = num_logits + count, *error = drawn + count;
  const Matrix<const int32_t> tokens{call.tokens.data, call.tokens.num_rows, call.tokens.width,
                                     call.tokens.stride};
  const auto of = [count](const int32_t* data) { return Ints(data, count); };
  const BatchRequest request{tokens,    call.block_table, call.slots,     of(start),
                             of(q_len), of(num_logits),   call.block_size};
  for (int32_t step = 0; step < call.k; ++step) {
    for (int64_t b = 0; b < count; ++b) {
      const bool is_drawing = step < call.limits[b];
      const int64_t end = int64_t{call.seq_len[b]} + step;
      start[b] = step == 0 ? call.start[b] : static_cast<int32_t>(end - 1);
      q_len[b] = is_drawing ? static_cast<int32_t>(end - start[b]) : 0;
      num_logits[b] = is_drawing;
    }
    const BatchSize size = measure_batch(request);
    const BatchArrays batch = draft_batch_.reserve(size, count);
    expand_batch(request, batch);
    draw_rows(
        {size.num_tokens, count, batch.token_ids, batch.positions, batch.kv_slots, batch.q_start,
         batch.context_len, call.slots.data(), call.block_table, batch.logit_rows,
         size.num_logit_rows, call.kv_cache, call.kv_dtype, call.num_blocks, call.block_size},
        vocab_size, rows, tables, drawn, error);
    for (int64_t b = 0, row = 0; b < count; ++b) {
      if (num_logits[b] == 0) continue;
      call.tokens[call.slots[b]][call.seq_len[b] + step] = drawn[row];
      call.drafted[b * call.k + step] = drawn[row];
      call.error[b * call.k + step] = error[row];
      ++row;
    }
  }
}

}  // namespace specengine
