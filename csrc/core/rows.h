// What rows are judged by: the columns of specengine/kernels/types/rows.py, in its order. Whatever
// handles all of them (the bindings, choosing rows) goes by this list; who uses a column names it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/scratch.h"

#define SPECENGINE_ROW_COLUMNS(COLUMN) \
  COLUMN(float, temperature)           \
  COLUMN(int32_t, top_k)               \
  COLUMN(float, top_p)                 \
  COLUMN(float, min_p)                 \
  COLUMN(int64_t, seeds)               \
  COLUMN(int32_t, rule)                \
  COLUMN(float, repetition_penalty)    \
  COLUMN(float, presence_penalty)      \
  COLUMN(float, frequency_penalty)     \
  COLUMN(int32_t, prompt_length)       \
  COLUMN(float, acceptance_threshold)  \
  COLUMN(float, acceptance_delta)      \
  COLUMN(float, draft_confidence)

namespace specengine {

struct SamplingRows {
#define COLUMN(type, name) const type* name;
  SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
};

struct WritableRows {
#define COLUMN(type, name) type* name;
  SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN

  // Row r becomes row index[r] of `rows`.
  void take(const SamplingRows& rows, const int32_t* index, int64_t count) const {
#define COLUMN(type, name) \
  for (int64_t r = 0; r < count; ++r) name[r] = rows.name[index[r]];
    SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
  }

#define COLUMN(type, name) name,
  operator SamplingRows() const { return {SPECENGINE_ROW_COLUMNS(COLUMN)}; }
#undef COLUMN
};

// Rows of a ragged batch: row r decides the position after token logit_rows[r], a token of sequence
// owner(r).
struct RaggedRows {
  int64_t num_sequences;
  const int32_t* slots;    // [num_sequences]
  const int32_t* q_start;  // [num_sequences + 1]
  const int32_t* positions;
  const int64_t* logit_rows;

  int64_t owner(int64_t row) const {
    const int32_t* ends = q_start + 1;
    return std::upper_bound(ends, ends + num_sequences, logit_rows[row]) - ends;
  }

  // The owners of the first num_rows rows, and the positions that they decide.
  void decide(int64_t num_rows, int32_t* owners, int32_t* decided) const {
    for (int64_t r = 0; r < num_rows; ++r) {
      owners[r] = static_cast<int32_t>(owner(r));
      decided[r] = positions[logit_rows[r]] + 1;
    }
  }
};

// The rows of a ragged batch one by one: slot, the position that is decided, and what judges it.
struct DecidedRows {
  int64_t num_rows;
  const int32_t* slots;
  const int32_t* positions;
  SamplingRows rows;
};

// Memory for them, which their next user writes over.
class DecidedRowsBuilder {
 public:
  // by_sequence: [num_sequences]
  DecidedRows build(const RaggedRows& ragged, int64_t num_rows, const SamplingRows& by_sequence) {
    int32_t* owners = integers_.reserve(3 * num_rows);
    int32_t* slots = owners + num_rows;
    int32_t* positions = slots + num_rows;
    ragged.decide(num_rows, owners, positions);
    for (int64_t r = 0; r < num_rows; ++r) slots[r] = ragged.slots[owners[r]];
#define COLUMN(type, name) name##_.reserve(num_rows),
    const WritableRows rows{SPECENGINE_ROW_COLUMNS(COLUMN)};
#undef COLUMN
    rows.take(by_sequence, owners, num_rows);
    return {num_rows, slots, positions, rows};
  }

 private:
  Scratch<int32_t> integers_;
#define COLUMN(type, name) Scratch<type> name##_;
  SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
};

}  // namespace specengine
