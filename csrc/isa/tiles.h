// Linears through tiles: up to sixteen rows meet sixteen columns at once. Included inside an
// instruction set's namespace, after its Tiles and table.h.
//
// 16-bit weights: rows are rounded to bf16, and a sum is that of tile products of 32 k in order,
// each the sum of its sixteen first and of its sixteen second halves of pairs. int8 and weights by
// group: sums are exact integers, of a chunk or a group, and the rest is as everywhere. How many
// rows share a tile changes nothing.

// Weight bytes of a panel that a tile's sixteen rows, 64 bytes each, meet: one after the other, so
// that a panel is read from front to back.
constexpr int64_t kWeightRowBytes = 4 * kPanelColumns;
constexpr int64_t kStepBytes = 16 * kWeightRowBytes;
// Steps of 16-bit weights that stay in the first cache while one tile of rows after the other meets
// them; their sums then wait in memory, as they are.
constexpr int64_t kBlockSteps = 8;
// How far ahead of the arithmetic weights are asked for where one tile of rows holds all.
constexpr int64_t kAheadBytes = 2 * kStepBytes;

class TilesInUse {
 public:
  explicit TilesInUse(const TileConfig& config) { Tiles::configure(config); }
  ~TilesInUse() { Tiles::release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Tiles 0 … 3 hold sums, 4 … kFirstWeights - 1 rows, the others weights.
// row_bytes: of a row that meets weights
template <int kFirstWeights>
inline TileConfig linear_tiles(int num_rows, int row_bytes) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_sum = tile < 4, is_weight = tile >= kFirstWeights;
    config.set_shape(tile, is_weight ? row_bytes / 4 : num_rows,
                     is_sum || is_weight ? 64 : row_bytes);
  }
  return config;
}

// The rows of one pass over a panel, in tiles of equal height: the last may hold spare rows.
struct TiledRows {
  int count, height;
  const char* x;
  int64_t row_bytes, chunk_bytes;
  float* totals;

  TiledRows(int num_rows, const float* x, int words, int64_t num_packed, float* totals)
      : count((num_rows + 15) / 16),
        height((num_rows + count - 1) / count),
        x(reinterpret_cast<const char*>(x)),
        row_bytes(int64_t{4} * words),
        chunk_bytes(num_packed * row_bytes),
        totals(totals) {
    const int num_spare = count * height - num_rows;
    __builtin_memset(totals + num_rows * kPanelColumns, 0,
                     sizeof(float) * num_spare * kPanelColumns);
  }

  const char* rows(int tile, int64_t chunk) const {
    return x + chunk * chunk_bytes + tile * height * row_bytes;
  }
  float* sums(int tile) const { return totals + tile * height * kPanelColumns; }
};

// A tile's part of what is asked for while all tiles meet what lies before it.
inline void ask_ahead(const char* weights, int64_t num_bytes, int tile, int count) {
  const int64_t num_lines = num_bytes / 64;
  for (int64_t i = num_lines * tile / count; i < num_lines * (tile + 1) / count; ++i) {
    __builtin_prefetch(weights + 64 * i, 0, 2);
  }
}

// A panel's weights, step after step; the last with zeros after it where it is not whole.
class WeightSteps {
 public:
  WeightSteps(const char* weights, int64_t num_bytes)
      : count((num_bytes + kStepBytes - 1) / kStepBytes),
        weights_(weights),
        last_(weights + (count - 1) * kStepBytes) {
    const int64_t num_last = num_bytes - (count - 1) * kStepBytes;
    if (num_last == kStepBytes) return;
    __builtin_memcpy(copy_, last_, num_last);
    __builtin_memset(copy_ + num_last, 0, kStepBytes - num_last);
    last_ = copy_;
  }
  WeightSteps(const WeightSteps&) = delete;
  WeightSteps& operator=(const WeightSteps&) = delete;

  const char* operator[](int64_t step) const {
    return step + 1 < count ? weights_ + step * kStepBytes : last_;
  }

  const int64_t count;

 private:
  const char* weights_;
  const char* last_;
  alignas(64) char copy_[kStepBytes];
};

template <class Visit>
inline void for_each_column(const Visit& visit) {
  visit.template operator()<0>();
  visit.template operator()<1>();
  visit.template operator()<2>();
  visit.template operator()<3>();
}

inline void load_sums(const float* sums) {
  for_each_column([&]<int c>() { Tiles::load<c>(sums + 16 * c, 4 * kPanelColumns); });
}
inline void store_sums(void* sums) {
  for_each_column(
      [&]<int c>() { Tiles::store<c>(static_cast<char*>(sums) + 64 * c, 4 * kPanelColumns); });
}

// A tile of rows and a step's weights, of all columns. Steps that follow each other take turns with
// the tiles that rows go to.
template <DType W, int kRows>
inline void multiply_step(const char* rows, int64_t row_bytes, const char* weights) {
  Tiles::load<kRows>(rows, row_bytes);
  for_each_column([&]<int c>() {
    constexpr int kWeights = 6 + c % 2;
    Tiles::load<kWeights>(weights + 64 * c, kWeightRowBytes);
    if constexpr (W == DType::kInt8) {
      Tiles::multiply_int8<c, kRows, kWeights>();
    } else {
      Tiles::multiply_bf16<c, kRows, kWeights>();
    }
  });
}

inline void add_bf16_panel(const TiledRows& tiled, const char* weights, int64_t k) {
  constexpr int kStepK = 32, kStepsPerChunk = kChunkK / kStepK;
  const WeightSteps steps(weights, panel_bytes(k, DType::kBFloat16));
  const TilesInUse in_use(linear_tiles<6>(tiled.height, 64));
  const int64_t block_steps = tiled.count == 1 ? steps.count : kBlockSteps;
  const int64_t ahead = tiled.count == 1 ? kAheadBytes : kBlockSteps * kStepBytes;
  for (int64_t block = 0; block < steps.count; block += block_steps) {
    const int64_t end = block + block_steps < steps.count ? block + block_steps : steps.count;
    for (int tile = 0; tile < tiled.count; ++tile) {
      load_sums(tiled.sums(tile));
      for (int64_t step = block; step < end; ++step) {
        ask_ahead(weights + step * kStepBytes + ahead, kStepBytes, tile, tiled.count);
        const char* rows =
            tiled.rows(tile, step / kStepsPerChunk) + step % kStepsPerChunk * 2 * kStepK;
        if (step % 2 == 0) {
          multiply_step<DType::kBFloat16, 4>(rows, tiled.row_bytes, steps[step]);
        } else {
          multiply_step<DType::kBFloat16, 5>(rows, tiled.row_bytes, steps[step]);
        }
      }
      store_sums(tiled.sums(tile));
    }
  }
}

// What a chunk's integers add to the sums of a tile of rows.
inline void add_int8_sums(int num_rows, const char* rows, int64_t row_bytes, const int32_t* sums,
                          float* totals) {
  using M = Multiply<DType::kInt8>;
  for (int r = 0; r < num_rows; ++r, rows += row_bytes, totals += kPanelColumns) {
    const auto* row = reinterpret_cast<const float*>(rows);
    for (int c = 0; c < kPanelColumns; c += 16) {
      const U16 sum = load_words(sums + r * kPanelColumns + c) + M::start(row);
      store(totals + c, M::accumulate(load(totals + c), sum, row));
    }
  }
}

inline void add_int8_panel(const TiledRows& tiled, const char* weights, int64_t k) {
  constexpr int kStepK = 64;
  const WeightSteps steps(weights, panel_bytes(k, DType::kInt8));
  const TilesInUse in_use(linear_tiles<6>(tiled.height, 64));
  constexpr int64_t kChunkBytes = panel_bytes(kChunkK, DType::kInt8);
  alignas(64) int32_t sums[16 * kPanelColumns];
  for (int64_t chunk = 0; chunk * kChunkK < k; ++chunk) {
    const int64_t step = chunk * kChunkK / kStepK;
    for (int tile = 0; tile < tiled.count; ++tile) {
      const char* rows = tiled.rows(tile, chunk);
      ask_ahead(weights + (chunk + 1) * kChunkBytes, kChunkBytes, tile, tiled.count);
      for_each_column([&]<int c>() { Tiles::zero<c>(); });
      multiply_step<DType::kInt8, 4>(rows, tiled.row_bytes, steps[step]);
      if (step + 1 < steps.count) {
        multiply_step<DType::kInt8, 5>(rows + kStepK, tiled.row_bytes, steps[step + 1]);
      }
      store_sums(sums);
      add_int8_sums(tiled.height, rows, tiled.row_bytes, sums, tiled.sums(tile));
    }
  }
}

// A group's codes as tiles take them: [kGroupK / 4, 64, 4] bytes.
constexpr int64_t kGroupCodeBytes = kGroupK * kPanelColumns;
template <DType W>
inline const char* expand_codes(const char* codes, char* out) {
  if constexpr (W == DType::kInt8Group) return codes;
  const U16 low_halves = set1_u(0x0f0f0f0f);
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int step = 0; step < kGroupK / 8; ++step, words += 2 * kPanelColumns) {
    for (int c = 0; c < kPanelColumns; c += 16, codes += 64) {
      const U16 both = load_words(codes);
      store(words + c, both & low_halves);
      store(words + kPanelColumns + c, shift_right<4>(both) & low_halves);
    }
  }
  return out;
}

// totals += a group's sums, of a tile of rows and all columns.
template <DType W>
inline void add_group_tiles(int num_rows, const char* rows, const char* group, const char* codes,
                            float* totals) {
  constexpr int64_t kRowBytes = 4 * FixedGroup<W>::kRowWords;
  alignas(64) int32_t sums[4][FixedGroup<W>::kDigits][16][16];
  Tiles::load<4>(rows, kRowBytes);
  Tiles::load<5>(rows + kGroupK, kRowBytes);
  Tiles::load<6>(rows + 2 * kGroupK, kRowBytes);
  for_each_column([&]<int c>() {
    Tiles::load<7>(codes + 64 * c, kWeightRowBytes);
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::multiply_int8<0, 4, 7>();
    Tiles::multiply_int8<1, 5, 7>();
    Tiles::multiply_int8<2, 6, 7>();
    Tiles::store<0>(sums[c][0], 64);
    Tiles::store<1>(sums[c][1], 64);
    Tiles::store<2>(sums[c][2], 64);
  });
  for (int c = 0; c < 4; ++c) {
    const GroupScales<W> scales(group, 16 * c);
    for (int r = 0; r < num_rows; ++r) {
      const auto* row = reinterpret_cast<const float*>(rows + r * kRowBytes);
      const auto* start = reinterpret_cast<const uint32_t*>(row) + FixedGroup<W>::kStart;
      const U16 low = load_words(sums[c][0][r]) + set1_u(start[0]);
      const U16 middle = load_words(sums[c][1][r]) + set1_u(start[1]);
      scales.add(low, shift_left<8>(load_words(sums[c][2][r])) + middle, row,
                 totals + r * kPanelColumns + 16 * c);
    }
  }
}

template <DType W>
inline void add_grouped_panel(const TiledRows& tiled, const char* weights, int64_t k) {
  constexpr int kGroups = kChunkK / kGroupK;
  const TilesInUse in_use(linear_tiles<7>(tiled.height, kGroupK));
  alignas(64) char expanded[kGroups][kGroupCodeBytes];
  const char* codes[kGroups];
  const char* group = weights;
  for (int64_t begin = 0; begin < k; begin += kChunkK) {
    const int64_t left = (k - begin) / kGroupK;
    const int count = left < kGroups ? static_cast<int>(left) : kGroups;
    for (int i = 0; i < kGroups && i < count; ++i) {
      codes[i] = expand_codes<W>(group + i * group_bytes(W) + group_header_bytes(W), expanded[i]);
    }
    for (int tile = 0; tile < tiled.count; ++tile) {
      const char* rows = tiled.rows(tile, begin / kChunkK);
      for (int i = 0; i < count; ++i) {
        ask_ahead(group + (i + kGroups) * group_bytes(W), group_bytes(W), tile, tiled.count);
        add_group_tiles<W>(tiled.height, rows + i * 4 * FixedGroup<W>::kWords,
                           group + i * group_bytes(W), codes[i], tiled.sums(tile));
      }
    }
    group += count * group_bytes(W);
  }
}

template <DType W>
inline void tile_panel_of(const LinearArgs& args, int64_t panel) {
  const char* weights = static_cast<const char*>(args.panels) + panel * panel_bytes(args.k, W);
  for_each_pass(args, panel, row_words(W), [&](int num_rows, const float* x, float* totals) {
    const TiledRows tiled(num_rows, x, row_words(W), args.num_rows, totals);
    if constexpr (is_grouped(W)) {
      add_grouped_panel<W>(tiled, weights, args.k);
    } else if constexpr (W == DType::kInt8) {
      add_int8_panel(tiled, weights, args.k);
    } else {
      add_bf16_panel(tiled, weights, args.k);
    }
  });
}

inline void tile_linear_panel(const LinearArgs& args, int64_t panel) {
  switch (args.dtype) {
    case DType::kFloat32:
      return linear_panel_of<DType::kFloat32>(args, panel);
    case DType::kFloat16:
      return linear_panel_of<DType::kFloat16>(args, panel);
    case DType::kBFloat16:
      return tile_panel_of<DType::kBFloat16>(args, panel);
    case DType::kInt8:
      return tile_panel_of<DType::kInt8>(args, panel);
    case DType::kInt4:
      return tile_panel_of<DType::kInt4>(args, panel);
    case DType::kInt4Min:
      return tile_panel_of<DType::kInt4Min>(args, panel);
    case DType::kInt8Group:
      return tile_panel_of<DType::kInt8Group>(args, panel);
  }
}

#include "isa/tiles_attention.h"

constexpr Kernels tile_table(const char* name) {
  Kernels kernels = table(name);
  kernels.linear_panel = tile_linear_panel;
  kernels.attention = attention_of<TileProducts>;
  return kernels;
}
