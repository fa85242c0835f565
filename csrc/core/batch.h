// A ragged batch: what each sequence feeds to a forward, and which logits it wants.
#pragma once

#include <cstdint>

#include "core/kernels.h"
#include "core/scratch.h"
#include "core/views.h"

namespace specengine {

// See ForwardBatch in specengine/kernels/types/program.py; kv_cache is [layers, 2, N, Hkv,
// block_size, head_dim].
struct BatchView {
  int64_t num_tokens, num_sequences;
  const int32_t* token_ids;
  const int32_t* positions;
  const int64_t* kv_slots;
  const int32_t* q_start;
  const int32_t* context_len;
  const int32_t* slots;
  Matrix<const int32_t> block_table;
  const int64_t* logit_rows;
  int64_t num_logit_rows;
  void* kv_cache;
  DType kv_dtype;
  int64_t num_blocks, block_size;
};

// Sequences of a ragged batch: rows q_start[b] … q_start[b + 1] - 1, whose context lies in the
// blocks of row slots[b] of the table.
void check_ragged(int64_t num_sequences, const int32_t* q_start, const int32_t* context_len,
                  const int32_t* slots, const Matrix<const int32_t>& block_table, int64_t num_rows,
                  int64_t num_blocks, int64_t block_size);

// Sequence b feeds q_len[b] of its tokens, from start[b] on, and wants the logits of the last
// num_logits[b] of them.
struct BatchRequest {
  Matrix<const int32_t> tokens, block_table;  // [S, P], [S, M]
  Ints slots, start, q_len, num_logits;       // [B]
  int64_t block_size;
};
struct BatchSize {
  int64_t num_tokens, num_logit_rows;
};
struct BatchArrays {
  int32_t *token_ids, *positions;  // [num_tokens]
  int64_t* kv_slots;               // [num_tokens]
  int32_t* q_start;                // [B + 1]
  int32_t* context_len;            // [B]
  int64_t* logit_rows;             // [num_logit_rows]
};
// How much there will be; fails where a sequence feeds what is not there.
BatchSize measure_batch(const BatchRequest& request);
void expand_batch(const BatchRequest& request, const BatchArrays& batch);

// Memory for a batch, which the next one writes over.
class BatchMemory {
 public:
  BatchArrays reserve(const BatchSize& size, int64_t num_sequences) {
    int32_t* integers = integers_.reserve(2 * size.num_tokens + 2 * num_sequences + 1);
    int64_t* longs = longs_.reserve(size.num_tokens + size.num_logit_rows);
    int32_t* q_start = integers + 2 * size.num_tokens;
    return {integers, integers + size.num_tokens,  longs,
            q_start,  q_start + num_sequences + 1, longs + size.num_tokens};
  }

 private:
  Scratch<int32_t> integers_;
  Scratch<int64_t> longs_;
};

}  // namespace specengine
