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
    const Kernels& isa = kernels();
    alignas(64) float changed[kTileColumns];
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* logits = tile + r * kTileColumns;
      const bool is_changed =
          draws.transforms != nullptr && draws.transforms[r].is_about(first_column, num_columns);
      if (kept[r] != nullptr || is_changed) {
        float* copy = kept[r] != nullptr ? kept[r] + first_column : changed;
        std::memcpy(copy, logits, sizeof(float) * num_columns);
        if (is_changed) draws.transforms[r].apply(first_column, num_columns, copy);
        if (kept[r] != nullptr) continue;
        logits = copy;
      }
      const RowView view{logits, num_columns, is_greedy(r) ? 1.0f : draws.rows.temperature[r],
                         kNegativeInfinity, 0.0f};
      if (isa.row_maximum(view).has_nan) progress[r].has_nan.store(true, std::memory_order_relaxed);
      const NoiseKey noise = key(r);
      const float best = progress[r].best.load(std::memory_order_relaxed);
      const RaceResult winner =
          isa.draw_tile(view, first_column, is_greedy(r) ? nullptr : &noise, best);
      found[r * num_tiles + first_column / kTileColumns] = winner;
      progress[r].raise(winner.score);
    }
  }

  // Tiles in order of id: a later winner must be strictly better.
  void finish(int64_t r) const {
    if (kept[r] != nullptr) {
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

void head_draw(const float* hidden, int64_t num_rows, const NormWeight& norm,
               const LinearWeight& weight, int64_t vocab_size, const DrawRows& draws) {
  static thread_local Scratch<RaceResult> results;
  static thread_local Scratch<RowProgress> progress;
  static thread_local Scratch<float*> kept;
  static thread_local Scratch<float> kept_logits;
  const int64_t num_tiles = (vocab_size + kTileColumns - 1) / kTileColumns;
  Draw draw{draws,
            num_rows,
            vocab_size,
            num_tiles,
            progress.reserve(num_rows),
            results.reserve(num_rows * num_tiles),
            kept.reserve(num_rows)};
  int64_t num_filtered = 0;
  for (int64_t r = 0; r < num_rows; ++r) num_filtered += draw.is_filtered(r) ? 1 : 0;
  float* next_kept = kept_logits.reserve(num_filtered * vocab_size);
  for (int64_t r = 0; r < num_rows; ++r) {
    new (&draw.progress[r]) RowProgress;
    draw.kept[r] = draw.is_filtered(r) ? next_kept : nullptr;
    if (draw.kept[r] != nullptr) next_kept += vocab_size;
  }
  linear_tiles(
      {hidden, num_rows, &norm, &weight, Activation::kNone, nullptr, nullptr, 0, vocab_size},
      [](void* context, int64_t first, int64_t count, const float* tile) {
        static_cast<const Draw*>(context)->consume(first, count, tile);
      },
      &draw);
  parallel_for(num_rows, num_filtered > 1, [&](int64_t r) { draw.finish(r); });
}

}  // namespace specengine
