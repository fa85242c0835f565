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
// K of a block: of a panel 128 KB of bf16, which stay in the second cache with those that are next,
// rows of a block, and sums that wait.
constexpr int64_t kBlockK = 1024;
// How far ahead of the arithmetic weights are asked for that nobody has asked for before.
constexpr int64_t kAheadBytes = 4 * kStepBytes;

class TilesInUse {
 public:
  explicit TilesInUse(const TileConfig& config) { Tiles::configure(config); }
  ~TilesInUse() { Tiles::release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Tiles 0 … 3 hold sums, 4 … first_weights - 1 rows, the others weights.
// row_bytes: of a row that meets weights
inline TileConfig linear_tiles(int64_t num_rows, int first_weights, int row_bytes) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_sum = tile < 4, is_weight = tile >= first_weights;
    config.set_shape(tile, is_weight ? row_bytes / 4 : static_cast<int>(num_rows),
                     is_sum || is_weight ? 64 : row_bytes);
  }
  return config;
}

// The rows of one pass, in tiles: the last may hold spare rows.
struct TiledRows {
  int count, height;
  const char* x;
  int64_t row_bytes, piece_bytes, tile_bytes;
  float* totals;

  // layout: of all rows; x: the pass's first
  TiledRows(int num_rows, const RowLayout& layout, int64_t row_k, const float* x, float* totals)
      : count(static_cast<int>((num_rows + layout.height - 1) / layout.height)),
        height(static_cast<int>(layout.height)),
        x(reinterpret_cast<const char*>(x)),
        row_bytes(int64_t{4} * layout.words),
        piece_bytes(height * row_bytes),
        tile_bytes(piece_bytes * layout.num_pieces(row_k)),
        totals(totals) {}

  const char* rows(int tile, int64_t piece) const {
    return x + tile * tile_bytes + piece * piece_bytes;
  }
  float* sums(int tile) const { return totals + tile * height * kPanelColumns; }
  void clear() const {
    __builtin_memset(totals, 0, sizeof(float) * count * height * kPanelColumns);
  }
};

// What is asked for while tiles are multiplied, a few lines at a turn: many at once would hold up
// the loads behind them. Weights that are needed next, and the lines where outputs will go: a store
// to a line that is not there waits for it.
class Asking {
 public:
  void ask_for_weights(const char* weights, int64_t num_bytes, int64_t num_turns) {
    at_ = weights;
    end_ = weights + num_bytes;
    turn_bytes_ = (num_bytes / 64 + num_turns - 1) / num_turns * 64;
  }
  void ask_for_outputs(const LinearArgs& args, int64_t first_row, int num_rows, int64_t panel) {
    const int columns = static_cast<int>(activated_columns(kPanelColumns, args.activation));
    out_ = reinterpret_cast<const char*>(args.out + first_row * args.out_stride + panel * columns -
                                         activated_columns(args.first_column, args.activation));
    out_stride_ = args.out_stride * int64_t{sizeof(float)};
    out_bytes_ = columns * static_cast<int>(sizeof(float));
    num_out_rows_ = num_rows;
  }

  void ask() {
    const char* const turn_end = at_ + turn_bytes_ < end_ ? at_ + turn_bytes_ : end_;
    for (; at_ < turn_end; at_ += 64) __builtin_prefetch(at_, 0, 2);
    if (num_out_rows_ == 0) return;
    __builtin_prefetch(out_ + out_at_, 1, 2);
    out_at_ += 64;
    if (out_at_ < out_bytes_) return;
    out_at_ = 0;
    out_ += out_stride_;
    --num_out_rows_;
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  int64_t turn_bytes_ = 0;
  const char* out_ = nullptr;
  int64_t out_stride_ = 0;
  int out_bytes_ = 0, out_at_ = 0, num_out_rows_ = 0;
};

// Visits of a block of weights, by one pass of rows after the other. The first block of several is
// asked for by the first visit while it reads it; all others ask for the next block, each for its
// part, so that memory works as long as they do. A lone visit reads on from one block to the next.
class Visits {
 public:
  // next: null after the last block
  Visits(const char* block, int64_t num_bytes, int64_t count, bool is_first, const char* next,
         int64_t num_next_bytes)
      : block_(block),
        next_(next),
        num_bytes_(num_bytes),
        num_next_lines_(next == nullptr ? 0 : num_next_bytes / 64),
        count_(count),
        is_first_(is_first) {}

  // What the next visit asks for, in so many turns.
  void begin(Asking& asking, int64_t num_turns) {
    const int64_t visit = done_++;
    if (count_ == 1 || (is_first_ && visit == 0)) {
      const int64_t num_bytes = count_ == 1 ? num_bytes_ : num_bytes_ - kAheadBytes;
      return asking.ask_for_weights(block_ + kAheadBytes, num_bytes, num_turns);
    }
    const int64_t count = count_ - is_first_, at = visit - is_first_;
    const int64_t begin = num_next_lines_ * at / count, end = num_next_lines_ * (at + 1) / count;
    asking.ask_for_weights(next_ + 64 * begin, 64 * (end - begin), num_turns);
  }

 private:
  const char* block_;
  const char* next_;
  int64_t num_bytes_, num_next_lines_, count_;
  bool is_first_;
  int64_t done_ = 0;
};

// Weights, step after step; the last with zeros after it where it is not whole.
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

template <DType W, int kSum, int kRows, int kWeights>
inline void multiply_tiles() {
  if constexpr (W == DType::kInt8) {
    Tiles::multiply_int8<kSum, kRows, kWeights>();
  } else {
    Tiles::multiply_bf16<kSum, kRows, kWeights>();
  }
}

// A tile of rows and a step's weights, of all columns. Steps that follow each other take turns with
// the tiles that rows go to.
template <DType W, int kRows>
inline void multiply_step(const char* rows, int64_t row_bytes, const char* weights,
                          Asking& asking) {
  Tiles::load<kRows>(rows, row_bytes);
  for_each_column([&]<int c>() {
    constexpr int kWeights = 6 + c % 2;
    asking.ask();
    Tiles::load<kWeights>(weights + 64 * c, kWeightRowBytes);
    multiply_tiles<W, c, kRows, kWeights>();
  });
}

// Two tiles of bf16 rows and a step's weights, of two tiles of columns.
inline void multiply_pair_step(const char* rows, const TiledRows& tiled, const char* weights,
                               Asking& asking) {
  Tiles::load<4>(rows, tiled.row_bytes);
  asking.ask();
  Tiles::load<6>(weights, kWeightRowBytes);
  multiply_tiles<DType::kBFloat16, 0, 4, 6>();
  asking.ask();
  Tiles::load<7>(weights + 64, kWeightRowBytes);
  multiply_tiles<DType::kBFloat16, 1, 4, 7>();
  Tiles::load<5>(rows + tiled.tile_bytes, tiled.row_bytes);
  multiply_tiles<DType::kBFloat16, 2, 5, 6>();
  multiply_tiles<DType::kBFloat16, 3, 5, 7>();
}

// A tile that was not stored for some hundreds of nanoseconds takes 250 more to store, so a
// processor with tiles is kept awake: every eighth step a tile of rows is stored to where nobody
// reads it.
class StoreAwake {
 public:
  void step(int64_t step) {
    if (step % 8 == 7) Tiles::store<4>(unread_, 64);
  }

 private:
  alignas(64) char unread_[16 * 64];
};

// The sums of a tile of rows and all columns, [16, stride], or of two tiles of rows and of columns.
constexpr int64_t kSumsStride = 4 * kPanelColumns;
template <class Visit>
inline void for_each_sum(bool is_pair, int height, const Visit& visit) {
  const int64_t below = int64_t{height} * kPanelColumns;
  visit.template operator()<0>(0);
  visit.template operator()<1>(16);
  visit.template operator()<2>(is_pair ? below : 32);
  visit.template operator()<3>(is_pair ? below + 16 : 48);
}
inline void clear_sums() {
  for_each_column([&]<int c>() { Tiles::zero<c>(); });
}
inline void load_sums(bool is_pair, int height, const float* sums) {
  for_each_sum(is_pair, height, [&]<int c>(int64_t at) { Tiles::load<c>(sums + at, kSumsStride); });
}
template <class T>
inline void store_sums(bool is_pair, int height, T* sums) {
  for_each_sum(is_pair, height,
               [&]<int c>(int64_t at) { Tiles::store<c>(sums + at, kSumsStride); });
}

// What a pass of rows and a block of weights add to the pass's sums, or, with is_first, are.
inline void add_bf16_block(const TiledRows& tiled, const WeightSteps& steps, bool is_first,
                           Visits& visits, Asking& asking) {
  constexpr DType W = DType::kBFloat16;
  const bool is_pair = tiled.count == 2;
  const int num_columns = is_pair ? 32 : kPanelColumns;
  StoreAwake awake;
  for (int column = 0; column < kPanelColumns; column += num_columns) {
    float* totals = tiled.totals + column;
    visits.begin(asking, steps.count * (is_pair ? 2 : 4));
    if (is_first) {
      clear_sums();
    } else {
      load_sums(is_pair, tiled.height, totals);
    }
    if (is_pair) {
      for (int64_t step = 0; step < steps.count; ++step) {
        multiply_pair_step(tiled.rows(0, step), tiled, steps[step] + 4 * column, asking);
        awake.step(step);
      }
    } else {
      for (int64_t step = 0; step < steps.count; ++step) {
        const char* rows = tiled.rows(0, step);
        if (step % 2 == 0) {
          multiply_step<W, 4>(rows, tiled.row_bytes, steps[step], asking);
        } else {
          multiply_step<W, 5>(rows, tiled.row_bytes, steps[step], asking);
        }
        awake.step(step);
      }
    }
    store_sums(is_pair, tiled.height, totals);
  }
}

// What a chunk's integers, [num_rows, kPanelColumns], add to the sums of as many rows.
inline void add_int8_sums(int num_rows, const char* rows, int64_t row_bytes, const int32_t* sums,
                          float* totals) {
  using M = Multiply<DType::kInt8>;
  for (int r = 0; r < num_rows; ++r, rows += row_bytes) {
    const auto* row = reinterpret_cast<const float*>(rows);
    const U16 start = M::start(row);
    for (int64_t at = r * kPanelColumns, end = at + kPanelColumns; at < end; at += 16) {
      store(totals + at, M::accumulate(load(totals + at), load_words(sums + at) + start, row));
    }
  }
}

// See add_bf16_block. A chunk meets one tile of rows after the other, while it is in the first
// cache; a tile's integers become floats while the next is multiplied.
inline void add_int8_block(const TiledRows& tiled, const WeightSteps& steps, bool is_first,
                           Visits& visits, Asking& asking) {
  constexpr DType W = DType::kInt8;
  constexpr int kStepK = 64, kStepsPerChunk = kChunkK / kStepK;
  alignas(64) int32_t sums[2][kTileRows * kPanelColumns];
  if (is_first) tiled.clear();
  visits.begin(asking, steps.count * 4 * tiled.count);
  int turn = 0, last_tile = 0;
  const char* last_rows = nullptr;
  const auto add_last = [&] {
    if (last_rows == nullptr) return;
    add_int8_sums(tiled.height, last_rows, tiled.row_bytes, sums[1 - turn], tiled.sums(last_tile));
  };
  for (int64_t chunk = 0, step = 0; step < steps.count; ++chunk, step += kStepsPerChunk) {
    for (int tile = 0; tile < tiled.count; ++tile) {
      const char* rows = tiled.rows(tile, chunk);
      clear_sums();
      multiply_step<W, 4>(rows, tiled.row_bytes, steps[step], asking);
      if (step + 1 < steps.count) {
        multiply_step<W, 5>(rows + kStepK, tiled.row_bytes, steps[step + 1], asking);
      }
      store_sums(false, tiled.height, sums[turn]);
      add_last();
      last_rows = rows;
      last_tile = tile;
      turn = 1 - turn;
    }
  }
  add_last();
}

// Panels begin … end - 1. Where several passes share the weights, K goes by in blocks, of one panel
// after the other, while the sums of all wait.
template <DType W>
inline void tile_panels_of(const LinearArgs& args, int64_t begin, int64_t end) {
  const RowLayout layout = row_layout(W, args.num_rows);
  const TilesInUse in_use(linear_tiles(layout.height, 6, 64));
  // bf16 rows in pairs of tiles, which visit half a panel at a time.
  constexpr bool kInPairs = W == DType::kBFloat16;
  constexpr int kPassRows = kInPairs ? kPairRows : kMaxPassRows;
  const int64_t whole = args.num_rows / kPassRows, rest = args.num_rows % kPassRows;
  const int64_t num_visits =
      kInPairs ? 2 * whole + (rest > kTileRows ? 2 : rest > 0) : whole + (rest > 0);
  const int64_t panel_sums = layout.size(args.num_rows, 1) / layout.words * kPanelColumns;
  const bool is_waiting =
      args.num_rows > kPairRows && args.k > kBlockK && panel_sums <= kWaitingSums;
  const int64_t block_k = is_waiting ? kBlockK : args.k;
  const int64_t at_once = is_waiting ? kWaitingSums / panel_sums : end - begin;
  const auto block_bytes = [&](int64_t k) {
    return panel_bytes(args.k - k < block_k ? args.k - k : block_k, W);
  };
  const auto block_at = [&](int64_t panel, int64_t k) {
    return static_cast<const char*>(args.panels) + panel * panel_bytes(args.k, W) +
           panel_bytes(k, W);
  };
  alignas(64) float totals[kPassRows * kPanelColumns];
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t stop = first + at_once < end ? first + at_once : end;
    for (int64_t k = 0; k < args.k; k += block_k) {
      const bool is_last = k + block_k >= args.k;
      const int64_t next_k = !is_last ? k + block_k : 0;
      const float* x = args.x + k / layout.k * layout.stride();
      for (int64_t panel = first; panel < stop; ++panel) {
        const bool is_followed = panel + 1 < stop;
        const int64_t after = is_followed ? panel + 1 : is_last ? stop : first;
        const int64_t after_k = is_followed ? k : next_k;
        const WeightSteps steps(block_at(panel, k), block_bytes(k));
        Visits visits(block_at(panel, k), block_bytes(k), num_visits, panel == begin && k == 0,
                      after < end ? block_at(after, after_k) : nullptr, block_bytes(after_k));
        for (int64_t pass = 0; pass < args.num_rows; pass += kPassRows) {
          const int64_t left = args.num_rows - pass;
          const int num_rows = left < kPassRows ? static_cast<int>(left) : kPassRows;
          float* sums = !is_waiting
                            ? totals
                            : args.waiting + (panel - first) * panel_sums + pass * kPanelColumns;
          const TiledRows tiled(num_rows, layout, args.k, x + layout.begin(pass, args.k), sums);
          Asking asking;
          if (is_last) asking.ask_for_outputs(args, pass, num_rows, panel);
          if constexpr (W == DType::kInt8) {
            add_int8_block(tiled, steps, k == 0, visits, asking);
          } else {
            add_bf16_block(tiled, steps, k == 0, visits, asking);
          }
          if (is_last) store_panel(args, pass, num_rows, panel * kPanelColumns, sums);
        }
      }
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
                            float* totals, Asking& asking) {
  constexpr int64_t kRowBytes = 4 * FixedGroup<W>::kRowWords;
  alignas(64) int32_t sums[4][FixedGroup<W>::kDigits][16][16];
  Tiles::load<4>(rows, kRowBytes);
  Tiles::load<5>(rows + kGroupK, kRowBytes);
  Tiles::load<6>(rows + 2 * kGroupK, kRowBytes);
  for_each_column([&]<int c>() {
    asking.ask();
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

// So few rows meet weights by group faster as vectors, with the same exact sums.
constexpr int64_t kFewGroupedRows = 6;

template <DType W>
inline void add_grouped_panel(const TiledRows& tiled, const char* weights, int64_t k,
                              Asking& asking) {
  constexpr int kGroups = kChunkK / kGroupK;
  alignas(64) char expanded[kGroups][kGroupCodeBytes];
  const char* codes[kGroups];
  const char* group = weights;
  tiled.clear();
  for (int64_t begin = 0; begin < k; begin += kChunkK) {
    const int64_t left = (k - begin) / kGroupK;
    const int count = left < kGroups ? static_cast<int>(left) : kGroups;
    for (int i = 0; i < kGroups && i < count; ++i) {
      codes[i] = expand_codes<W>(group + i * group_bytes(W) + group_header_bytes(W), expanded[i]);
    }
    for (int tile = 0; tile < tiled.count; ++tile) {
      const char* rows = tiled.rows(tile, begin / kChunkK);
      for (int i = 0; i < count; ++i) {
        add_group_tiles<W>(tiled.height, rows + i * 4 * FixedGroup<W>::kWords,
                           group + i * group_bytes(W), codes[i], tiled.sums(tile), asking);
      }
    }
    group += count * group_bytes(W);
  }
}

template <DType W>
inline void tile_grouped_panels_of(const LinearArgs& args, int64_t begin, int64_t end) {
  if (args.num_rows <= kFewGroupedRows) return linear_panels_of<W>(args, begin, end);
  const int64_t num_bytes = panel_bytes(args.k, W);
  const RowLayout layout = row_layout(W, args.num_rows);
  const TilesInUse in_use(linear_tiles(layout.height, 7, kGroupK));
  for (int64_t panel = begin; panel < end; ++panel) {
    const char* weights = static_cast<const char*>(args.panels) + panel * num_bytes;
    for_each_pass(args, panel, [&](int num_rows, const float* x, float* totals) {
      const TiledRows tiled(num_rows, layout, args.k, x, totals);
      const int64_t num_turns = args.k / kGroupK * 4 * tiled.count;
      Asking asking;
      asking.ask_for_weights(weights + kChunkK / kGroupK * group_bytes(W), num_bytes, num_turns);
      add_grouped_panel<W>(tiled, weights, args.k, asking);
    });
  }
}

inline void tile_linear_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return linear_panels_of<DType::kFloat32>(args, begin, end);
    case DType::kFloat16:
      return linear_panels_of<DType::kFloat16>(args, begin, end);
    case DType::kBFloat16:
      return tile_panels_of<DType::kBFloat16>(args, begin, end);
    case DType::kInt8:
      return tile_panels_of<DType::kInt8>(args, begin, end);
    case DType::kInt4:
      return tile_grouped_panels_of<DType::kInt4>(args, begin, end);
    case DType::kInt4Min:
      return tile_grouped_panels_of<DType::kInt4Min>(args, begin, end);
    case DType::kInt8Group:
      return tile_grouped_panels_of<DType::kInt8Group>(args, begin, end);
  }
}

#include "isa/tiles_attention.h"

constexpr Kernels tile_table(const char* name) {
  Kernels kernels = table(name);
  kernels.linear_panels = tile_linear_panels;
  kernels.attention = attention_of<TileProducts>;
  return kernels;
}
