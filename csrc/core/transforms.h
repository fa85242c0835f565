// What sequences ask to be done to their logits (specengine/kernels/types/transforms.py), on a row
// or on a tile of one: where draws store no logits, they are changed tile by tile.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "core/rows.h"
#include "core/scratch.h"
#include "core/views.h"

namespace specengine {

// Tables by slot; a slot's entries are in order of their tokens.
struct TransformTables {
  Matrix<const int32_t> history;  // [S, L]
  const int32_t* num_entries;     // [S]
  const int32_t* token;           // [S, entry_stride], as the next five
  const float* value;
  const int32_t* first;
  const int32_t* end;
  const int32_t* prefix_start;
  const int32_t* prefix_length;
  int64_t entry_stride;
  const int32_t* prefix;  // [S, prefix_stride]
  int64_t prefix_stride;
};

// What one row asks for at the position that it decides.
struct RowTransform {
  const int32_t* token;
  const float* value;
  const int32_t* first;
  const int32_t* end;
  const int32_t* prefix_start;
  const int32_t* prefix_length;
  const int32_t* prefix;
  int64_t num_entries;
  const int32_t* history;
  int32_t position;
  float repetition, presence, frequency;
  const uint64_t* seen;  // a bit a token of the vocabulary; null where nothing is penalised
  // Where tokens are counted, else null: how many marked ones come before each 64 of the
  // vocabulary, and how often each of them was generated.
  const int32_t* num_before;
  const int32_t* num_generated;

  // Changes the logits of tokens first_token … first_token + count - 1, `logits[0]` being the
  // first's; first_token is a multiple of 64.
  void apply(int64_t first_token, int64_t count, float* logits) const {
    penalise(first_token, count, logits);
    for (int64_t entry = first_entry(first_token);
         entry < num_entries && token[entry] < first_token + count; ++entry) {
      if (first[entry] <= position && position < end[entry] && follows(entry))
        logits[token[entry] - first_token] += value[entry];
    }
  }

  bool is_about(int64_t first_token, int64_t count) const {
    if (seen != nullptr) {
      const uint64_t* words = seen + first_token / 64;
      const auto is_marked = [](uint64_t bits) { return bits != 0; };
      if (std::any_of(words, words + (count + 63) / 64, is_marked)) return true;
    }
    const int64_t entry = first_entry(first_token);
    return entry < num_entries && token[entry] < first_token + count;
  }

 private:
  friend class RowTransforms;
  RowTransform() = default;

  bool is_counting() const { return presence != 0.0f || frequency != 0.0f; }

  void penalise(int64_t first_token, int64_t count, float* logits) const {
    if (seen == nullptr) return;
    for (int64_t base = 0; base < count; base += 64) {
      const int64_t word = (first_token + base) / 64;
      const int32_t* count = num_before == nullptr ? nullptr : num_generated + num_before[word];
      for (uint64_t bits = seen[word]; bits != 0; bits &= bits - 1) {
        float& z = logits[base + std::countr_zero(bits)];
        z = z < 0.0f ? z * repetition : z / repetition;
        if (count == nullptr) continue;
        if (*count > 0) z = z - static_cast<float>(*count) * frequency - presence;
        ++count;
      }
    }
  }

  // Whether the entry's prefix stands right before the position.
  bool follows(int64_t entry) const {
    const int64_t length = prefix_length[entry];
    if (length > position) return false;
    const int32_t* wanted = prefix + prefix_start[entry];
    return std::equal(wanted, wanted + length, history + position - length);
  }

  int64_t first_entry(int64_t first_token) const {
    return std::lower_bound(token, token + num_entries, first_token) - token;
  }
};

// The transforms of the rows of a batch, over a vocabulary of `vocab` tokens; fails where a number
// points outside the tables.
class RowTransforms {
 public:
  const RowTransform* build(const TransformTables& tables, const DecidedRows& decided,
                            int64_t vocab) {
    RowTransform* rows = rows_.reserve(decided.num_rows);
    int64_t num_counted = 0;
    for (int64_t r = 0; r < decided.num_rows; ++r) {
      check_index(decided.slots[r], 0, tables.history.num_rows, "slots", r);
      check_index(decided.positions[r], 0, tables.history.width + 1, "positions", r);
      check_index(tables.num_entries[decided.slots[r]], 0, tables.entry_stride + 1, "num_entries",
                  r);
      const int64_t at = decided.slots[r] * tables.entry_stride;
      rows[r].token = tables.token + at;
      rows[r].value = tables.value + at;
      rows[r].first = tables.first + at;
      rows[r].end = tables.end + at;
      rows[r].prefix_start = tables.prefix_start + at;
      rows[r].prefix_length = tables.prefix_length + at;
      rows[r].prefix = tables.prefix + decided.slots[r] * tables.prefix_stride;
      rows[r].num_entries = tables.num_entries[decided.slots[r]];
      if (r == 0 || decided.slots[r] != decided.slots[r - 1])
        check_prefixes(rows[r], tables.prefix_stride);
      rows[r].history = tables.history[decided.slots[r]];
      rows[r].position = decided.positions[r];
      rows[r].repetition = decided.rows.repetition_penalty[r];
      rows[r].presence = decided.rows.presence_penalty[r];
      rows[r].frequency = decided.rows.frequency_penalty[r];
      if (rows[r].is_counting()) num_counted += decided.positions[r];
    }
    mark(decided, vocab, num_counted);
    return rows;
  }

 private:
  static void check_prefixes(const RowTransform& row, int64_t stride) {
    for (int64_t entry = 0; entry < row.num_entries; ++entry) {
      const int64_t length = row.prefix_length[entry];
      if (length == 0) continue;
      check_index(length, 0, stride + 1, "prefix_length", entry);
      check_index(row.prefix_start[entry], 0, stride - length + 1, "prefix_start", entry);
    }
  }

  // What each row penalises: a repetition penalty whatever stands before the position, the others
  // what was generated. num_counted: at most so many tokens are counted in all.
  void mark(const DecidedRows& decided, int64_t vocab, int64_t num_counted) {
    RowTransform* rows = rows_.reserve(decided.num_rows);
    const int64_t num_words = (vocab + 63) / 64;
    uint64_t* seen = seen_.reserve(decided.num_rows * num_words);
    int32_t* num_before = num_before_.reserve(num_counted > 0 ? decided.num_rows * num_words : 0);
    int32_t* num_generated = num_generated_.reserve(num_counted);
    for (int64_t r = 0; r < decided.num_rows; ++r, seen += num_words) {
      RowTransform& row = rows[r];
      row.seen = nullptr;
      row.num_before = row.num_generated = nullptr;
      if (row.repetition == 1.0f && !row.is_counting()) continue;
      const int32_t* history = row.history;
      const int64_t length = decided.positions[r];
      const int64_t prompt_length = std::max(decided.rows.prompt_length[r], 0);
      mark_seen(history, row.repetition == 1.0f ? prompt_length : 0, length, vocab, seen);
      row.seen = seen;
      if (!row.is_counting() || length == 0) continue;
      row.num_before = num_before + r * num_words;
      row.num_generated = num_generated;
      count_generated(history, prompt_length, length, vocab, seen, num_before + r * num_words,
                      num_generated);
      num_generated += length;
    }
  }

  static void mark_seen(const int32_t* history, int64_t begin, int64_t end, int64_t vocab,
                        uint64_t* seen) {
    std::memset(seen, 0, sizeof(uint64_t) * ((vocab + 63) / 64));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = history[i];
      if (token >= 0 && token < vocab) seen[token / 64] |= uint64_t{1} << token % 64;
    }
  }

  // Tokens from `begin` on, which are marked, by their rank among the marked ones.
  static void count_generated(const int32_t* history, int64_t begin, int64_t end, int64_t vocab,
                              const uint64_t* seen, int32_t* num_before, int32_t* counts) {
    int32_t num_marked = 0;
    for (int64_t word = 0; word < (vocab + 63) / 64; ++word) {
      num_before[word] = num_marked;
      num_marked += std::popcount(seen[word]);
    }
    std::fill_n(counts, num_marked, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = history[i];
      if (token < 0 || token >= vocab) continue;
      const uint64_t lower = (uint64_t{1} << token % 64) - 1;
      ++counts[num_before[token / 64] + std::popcount(seen[token / 64] & lower)];
    }
  }

  Scratch<RowTransform> rows_;
  Scratch<uint64_t> seen_;
  Scratch<int32_t> num_before_, num_generated_;
};

}  // namespace specengine
