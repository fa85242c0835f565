#include <algorithm>
#include <atomic>
#include <limits>

#include "ops.h"
#include "scratch.h"

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
  const DrawRows& rows;
  int64_t num_rows;
  int64_t num_tiles;
  RowProgress* progress;  // [num_rows]
  RaceResult* found;      // [num_rows, num_tiles]

  void consume(int64_t first_column, int64_t num_columns, const float* tile) const {
    const Kernels& isa = kernels();
    for (int64_t r = 0; r < num_rows; ++r) {
      const float temperature = rows.temperature[r];
      const bool is_greedy = !(temperature > 0.0f);
      const RowView view{tile + r * kTileColumns, num_columns, is_greedy ? 1.0f : temperature,
                         kNegativeInfinity, 0.0f};
      if (isa.row_maximum(view).has_nan) progress[r].has_nan.store(true, std::memory_order_relaxed);
      const NoiseKey key{static_cast<uint64_t>(rows.seeds[r]),
                         static_cast<uint32_t>(rows.positions[r]), kStreamTarget, 0};
      const float best = progress[r].best.load(std::memory_order_relaxed);
      const RaceResult winner = isa.draw_tile(view, first_column, is_greedy ? nullptr : &key, best);
      found[r * num_tiles + first_column / kTileColumns] = winner;
      progress[r].raise(winner.score);
    }
  }

  // Tiles in order of id: a later winner must be strictly better.
  void finish(int64_t r) const {
    RaceResult winner{0, kNegativeInfinity};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const RaceResult& candidate = found[r * num_tiles + tile];
      if (candidate.score > winner.score) winner = candidate;
    }
    rows.tokens[r] = winner.token;
    rows.error[r] = progress[r].has_nan.load() || winner.score == kNegativeInfinity ? 1 : 0;
  }
};

}  // namespace

void head_draw(const float* hidden, int64_t num_rows, const NormWeight& norm,
               const LinearWeight& weight, int64_t vocab_size, const DrawRows& rows) {
  static thread_local Scratch<RaceResult> results;
  static thread_local Scratch<RowProgress> progress;
  const int64_t num_tiles = (vocab_size + kTileColumns - 1) / kTileColumns;
  Draw draw{rows, num_rows, num_tiles, progress.reserve(num_rows),
            results.reserve(num_rows * num_tiles)};
  for (int64_t r = 0; r < num_rows; ++r) new (&draw.progress[r]) RowProgress;
  linear_tiles(
      {hidden, num_rows, &norm, &weight, Activation::kNone, nullptr, nullptr, 0, vocab_size},
      [](void* context, int64_t first, int64_t count, const float* tile) {
        static_cast<const Draw*>(context)->consume(first, count, tile);
      },
      &draw);
  for (int64_t r = 0; r < num_rows; ++r) draw.finish(r);
}

}  // namespace specengine
