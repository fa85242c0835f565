#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// What the threads know of one row: a score that is already reached, so that hopeless tokens need
// no noise, and whether a NaN was seen.
struct RowProgress {
  std::atomic<float> best{kNegativeInfinity};
  std::atomic<bool> has_nan{false};

  void raise(float score) {
    float known = best.load(std::memory_order_relaxed);
    while (score > known && !best.compare_exchange_weak(known, score, std::memory_order_relaxed)) {
    }
  }
};

struct Draw {
  const DrawRows& draws;
  int64_t num_rows;
  int64_t vocab;
  int64_t num_tiles;
  RowProgress* progress;  // [num_rows]
  RaceResult* found;      // [num_rows, num_tiles]
  float** kept;           // [num_rows], the logits of rows that are filtered, else null
  Ints token_ids;         // of the columns, ascending; empty: column v is token v

  bool is_greedy(int64_t r) const { return !(draws.rows.temperature[r] > 0.0f); }
  bool is_filtered(int64_t r) const {
    return !is_greedy(r) &&
           (draws.rows.top_k[r] > 0 || draws.rows.top_p[r] < 1.0f || draws.rows.min_p[r] > 0.0f);
  }
  NoiseKey key(int64_t r) const {
    return {static_cast<uint64_t>(draws.rows.seeds[r]), static_cast<uint32_t>(draws.positions[r]),
            kStreamTarget, 0};
  }

  void consume(int64_t first_column, int64_t num_columns, const float* tile) const {
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* logits = tile + r * kTileColumns;
      if (kept[r] != nullptr) {
        keep(r, first_column, num_columns, logits);
        continue;
      }
      found[r * num_tiles + first_column / kTileColumns] =
          token_ids.empty() ? draw(r, first_column, num_columns, logits)
                            : draw_spread(r, first_column, num_columns, logits);
    }
  }

  void keep(int64_t r, int64_t first_column, int64_t num_columns, const float* logits) const {
    if (token_ids.empty()) {
      std::memcpy(kept[r] + first_column, logits, sizeof(float) * num_columns);
      return;
    }
    for (int64_t at = 0; at < num_columns; ++at) kept[r][token_ids[first_column + at]] = logits[at];
  }

  // The winner of tokens first_token … first_token + count - 1; first_token is a multiple of
  // kTileColumns, as the noise of tokens comes in groups.
  RaceResult draw(int64_t r, int64_t first_token, int64_t count, const float* logits) const {
    const Kernels& isa = kernels();
    alignas(64) float changed[kTileColumns];
    if (draws.transforms != nullptr && draws.transforms[r].is_about(first_token, count)) {
      std::memcpy(changed, logits, sizeof(float) * count);
      draws.transforms[r].apply(first_token, count, changed);
      logits = changed;
    }
    const RowView view{logits, count, is_greedy(r) ? 1.0f : draws.rows.temperature[r],
                       kNegativeInfinity, 0.0f};
    if (isa.row_maximum(view).has_nan) progress[r].has_nan.store(true, std::memory_order_relaxed);
    const NoiseKey noise = key(r);
    const float best = progress[r].best.load(std::memory_order_relaxed);
    const RaceResult winner =
        isa.draw_tile(view, first_token, is_greedy(r) ? nullptr : &noise, best);
    progress[r].raise(winner.score);
    return winner;
  }

  // The same of columns whose tokens lie apart: each tile of the vocabulary that has any of them,
  // and nothing else in it.
  RaceResult draw_spread(int64_t r, int64_t first_column, int64_t num_columns,
                         const float* logits) const {
    alignas(64) float tile[kTileColumns];
    RaceResult winner{0, kNegativeInfinity};
    for (int64_t at = 0; at < num_columns;) {
      const int64_t first_token = token_ids[first_column + at] / kTileColumns * kTileColumns;
      const int64_t count = std::min(kTileColumns, vocab - first_token);
      std::fill_n(tile, count, kNegativeInfinity);
      for (; at < num_columns && token_ids[first_column + at] < first_token + count; ++at)
        tile[token_ids[first_column + at] - first_token] = logits[at];
      const RaceResult candidate = draw(r, first_token, count, tile);
      if (candidate.score > winner.score) winner = candidate;
    }
    return winner;
  }

  // Tiles in order of id: a later winner must be strictly better.
  void finish(int64_t r) const {
    if (kept[r] != nullptr) {
      if (draws.transforms != nullptr) draws.transforms[r].apply(0, vocab, kept[r]);
      const FilteredDraw drawn = draw_filtered(kept[r], vocab, draws.rows, r, key(r));
      draws.tokens[r] = drawn.token;
      draws.error[r] = drawn.is_bad ? 1 : 0;
      return;
    }
    RaceResult winner{0, kNegativeInfinity};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const RaceResult& candidate = found[r * num_tiles + tile];
      if (candidate.score > winner.score) winner = candidate;
    }
    draws.tokens[r] = winner.token;
    draws.error[r] = progress[r].has_nan.load() || winner.score == kNegativeInfinity ? 1 : 0;
  }
};

}  // namespace

void head_draw(const float* hidden, int64_t num_rows, const Head& weights, int64_t vocab_size,
               const DrawRows& draws) {
  static thread_local Scratch<RaceResult> results;
  static thread_local Scratch<RowProgress> progress;
  static thread_local Scratch<float*> kept;
  static thread_local Scratch<float> kept_logits;
  const int64_t num_columns = weights.num_rows(vocab_size);
  const int64_t num_tiles = (num_columns + kTileColumns - 1) / kTileColumns;
  Draw draw{draws,
            num_rows,
            vocab_size,
            num_tiles,
            progress.reserve(num_rows),
            results.reserve(num_rows * num_tiles),
            kept.reserve(num_rows),
            weights.token_ids};
  int64_t num_filtered = 0;
  for (int64_t r = 0; r < num_rows; ++r) num_filtered += draw.is_filtered(r) ? 1 : 0;
  float* next_kept = kept_logits.reserve(num_filtered * vocab_size);
  if (!weights.has_all_tokens())
    std::fill_n(next_kept, num_filtered * vocab_size, kNegativeInfinity);
  for (int64_t r = 0; r < num_rows; ++r) {
    new (&draw.progress[r]) RowProgress;
    draw.kept[r] = draw.is_filtered(r) ? next_kept : nullptr;
    if (draw.kept[r] != nullptr) next_kept += vocab_size;
  }
  const LinearCall call{
      hidden,  num_rows, &weights.norm, &weights.weight, Activation::kNone, nullptr,
      nullptr, 0,        num_columns};
  if (num_columns > 0) {
    linear_tiles(
        call,
        [](void* context, int64_t first, int64_t count, const float* tile) {
          static_cast<const Draw*>(context)->consume(first, count, tile);
        },
        &draw);
  }
  parallel_for(num_rows, num_filtered > 1, [&](int64_t r) { draw.finish(r); });
}

}  // namespace specengine
