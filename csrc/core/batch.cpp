#include "core/batch.h"

#include <algorithm>

namespace specengine {

void check_ragged(int64_t num_sequences, const int32_t* q_start, const int32_t* context_len,
                  const int32_t* slots, const Matrix<const int32_t>& block_table, int64_t num_rows,
                  int64_t num_blocks, int64_t block_size) {
  check_range(slots, num_sequences, "slots", 0, block_table.num_rows);
  if (q_start[0] != 0 || q_start[num_sequences] != num_rows) {
    fail("q_start: runs from ", q_start[0], " to ", q_start[num_sequences], " over ", num_rows,
         " rows");
  }
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t rows = int64_t{q_start[b + 1]} - q_start[b];
    const int64_t length = context_len[b];
    if (rows < 0) fail("q_start: decreases at index ", b + 1);
    if (length < rows)
      fail("context_len: ", length, " at index ", b, " is below the sequence's ", rows, " rows");
    const int64_t blocks = (length + block_size - 1) / block_size;
    if (blocks > block_table.width) {
      fail("context_len: ", length, " at index ", b, " does not fit ", block_table.width,
           " blocks of ", block_size);
    }
    if (rows > 0) check_range(block_table[slots[b]], blocks, "block_table", 0, num_blocks);
  }
}

BatchSize measure_batch(const BatchRequest& request) {
  const auto count = static_cast<int64_t>(request.slots.size());
  check_range(request.slots.data(), count, "slots", 0, request.tokens.num_rows);
  if (request.block_size < 1) fail("block_size: ", request.block_size, " is below 1");
  const int64_t capacity =
      std::min(request.tokens.width, request.block_table.width * request.block_size);
  BatchSize size{0, 0};
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = request.start[b], length = request.q_len[b];
    const int64_t wanted = request.num_logits[b];
    // Where nothing is fed, start means nothing.
    if (length < 0 || (length > 0 && (first < 0 || first + length > capacity)))
      fail("q_len: ", length, " tokens from ", first, " on do not fit ", capacity);
    if (wanted < 0 || wanted > length)
      fail("num_logits: ", wanted, " at index ", b, " is outside 0 … ", length);
    size.num_tokens += length;
    size.num_logit_rows += wanted;
  }
  return size;
}

void expand_batch(const BatchRequest& request, const BatchArrays& batch) {
  const int64_t block_size = request.block_size;
  int64_t* logit_row = batch.logit_rows;
  int32_t at = 0;
  batch.q_start[0] = 0;
  for (int64_t b = 0; b < static_cast<int64_t>(request.slots.size()); ++b) {
    const int32_t* tokens = request.tokens[request.slots[b]];
    const int32_t* blocks = request.block_table[request.slots[b]];
    const int32_t end = request.start[b] + request.q_len[b];
    for (int32_t position = request.start[b]; position < end; ++position, ++at) {
      batch.token_ids[at] = tokens[position];
      batch.positions[at] = position;
      batch.kv_slots[at] = blocks[position / block_size] * block_size + position % block_size;
    }
    for (int32_t i = request.num_logits[b]; i > 0; --i) *logit_row++ = at - i;
    batch.q_start[b + 1] = at;
    batch.context_len[b] = request.q_len[b] == 0 ? 0 : end;
  }
}

}  // namespace specengine
