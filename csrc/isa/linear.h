// The norm of one row and one panel of a linear layer. Included inside an instruction set's
// namespace.

// Sum of (x - mean)^2.
inline float sum_of_squares(const float* x, float mean, int64_t size) {
  const int64_t whole = size / 16 * 16;
  F16 squares = set1(0.0f);
  for (int64_t i = 0; i < whole; i += 16) {
    const F16 centred = load(x + i) - set1(mean);
    squares = fma(centred, centred, squares);
  }
  if (const int rest = static_cast<int>(size - whole); rest > 0) {
    const F16 centred = load_first(x + whole, rest, mean) - set1(mean);
    squares = fma(centred, centred, squares);
  }
  return reduce_add(squares);
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       int64_t size, float* out) {
  const int64_t whole = size / 16 * 16;
  const int rest = static_cast<int>(size - whole);
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < whole; i += 16) sum = sum + load(x + i);
  if (rest > 0) sum = sum + load_first(x + whole, rest, 0.0f);
  const float mean = reduce_add(sum) / static_cast<float>(size);
  const float variance = sum_of_squares(x, mean, size) / static_cast<float>(size);
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  for (int64_t i = 0; i < whole; i += 16) {
    const F16 normal = (load(x + i) - set1(mean)) * set1(scale);
    store(out + i, fma(normal, load(weight + i), load(bias + i)));
  }
  if (rest > 0) {
    const F16 normal = (load_first(x + whole, rest, mean) - set1(mean)) * set1(scale);
    const F16 y =
        fma(normal, load_first(weight + whole, rest, 0.0f), load_first(bias + whole, rest, 0.0f));
    store_first(out + whole, y, rest);
  }
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
  const int64_t whole = size / 16 * 16;
  const float mean_square = sum_of_squares(x, 0.0f, size) / static_cast<float>(size);
  const F16 scale = set1(1.0f / __builtin_sqrtf(mean_square + eps));
  for (int64_t i = 0; i < whole; i += 16) store(out + i, load(x + i) * scale * load(weight + i));
  if (const int rest = static_cast<int>(size - whole); rest > 0) {
    const F16 normal = load_first(x + whole, rest, 0.0f) * scale;
    store_first(out + whole, normal * load_first(weight + whole, rest, 0.0f), rest);
  }
}

inline void norm_row(const float* x, const float* weight, const float* bias, float eps,
                     int64_t size, float* out) {
  if (bias == nullptr) {
    rms_norm(x, weight, eps, size, out);
  } else {
    layer_norm(x, weight, bias, eps, size, out);
  }
}

// See Kernels::min_group_rows. Tiles multiply so much faster that a whole pass has to share a
// panel.
constexpr int64_t kMinGroupRows = kHasTiles ? kMaxPassRows : 128;

// Whether bf16 weights meet rows that are rounded to bf16.
constexpr bool kRoundsToBf16 = kHasBf16Dot || kHasTiles;

// Rows of a pass through tiles: a pair of tiles, whose sums of two tiles of columns stay in
// registers over a block of K.
constexpr int kTileRows = 16, kPairRows = 2 * kTileRows;
// Rows of a tile: of one or of two equal ones where they hold all, else of full ones.
constexpr int64_t tile_height(int64_t num_rows) {
  if (num_rows > kPairRows) return kTileRows;
  return num_rows > kTileRows ? (num_rows + 1) / 2 : num_rows;
}

// Rows as weights of a type multiply them; see pack_row. A tile's rows are a stack, what it reads
// of them lies in whole cache lines, and those of bf16 rows follow each other.
constexpr RowLayout row_layout(DType weights, int64_t num_rows) {
  const bool is_tiled = kHasTiles && weights != DType::kFloat32 && weights != DType::kFloat16;
  const int64_t height = num_rows == 0 ? 1 : is_tiled ? tile_height(num_rows) : num_rows;
  if (is_grouped(weights)) return {kChunkK, fixed_row_words(weights), height};
  if (weights == DType::kInt8) return {kChunkK, kChunkK / 4 + (kHasTiles ? 16 : 2), height};
  if (weights == DType::kBFloat16 && kHasTiles) return {32, 16, height};
  return {kChunkK, kRoundsToBf16 && weights == DType::kBFloat16 ? kChunkK / 2 : kChunkK, height};
}
constexpr int row_words(DType weights) { return row_layout(weights, 1).words; }

// One chunk in floats, `num_k` of them.
inline void pack_floats(const float* x, int num_k, float* out) {
  __builtin_memcpy(out, x, sizeof(float) * num_k);
  if (num_k % 2 != 0) out[num_k] = 0.0f;
}

inline void store_bf16(uint16_t* out, F16 v) {
  const U16 bits = as_bits(v);
  const U16 rounded = bits + set1_u(0x7fff) + (shift_right<16>(bits) & set1_u(1));
  store_halves(out, shift_right<16>(select(is_nan(v), set1_u(0x7fc00000), rounded)));
}

// Up to kSize elements rounded to bf16, two to a word, and zeros after them.
template <int kSize>
inline void pack_bf16(const float* x, int num_k, uint32_t* out) {
  alignas(64) uint16_t halves[kSize] = {};
  if (num_k == kSize) {
    for (int i = 0; i < kSize; i += 16) store_bf16(halves + i, load(x + i));
  } else {
    for (int i = 0; i < num_k; i += 16) {
      store_bf16(halves + i, load_first(x + i, num_k - i < 16 ? num_k - i : 16, 0.0f));
    }
  }
  __builtin_memcpy(out, halves, sizeof(halves));
}

// One chunk rounded to multiples of max |x| / 127, four to a word, then that scale (NaN if an
// element is not finite), then what a sum of products with weights + 128 starts from.
inline void pack_int8(const float* x, int num_k, uint32_t* out) {
  F16 largest = set1(0.0f), poison = set1(0.0f);
  for (int i = 0; i < num_k; i += 16) {
    const F16 v = load_first(x + i, num_k - i < 16 ? num_k - i : 16, 0.0f);
    largest = maximum(largest, maximum(v, set1(0.0f) - v));
    poison = fma(v, set1(0.0f), poison);
  }
  const float size = reduce_max(largest);
  const float scale = size / 127.0f + reduce_add(poison);
  const bool is_usable = scale > 0.0f;  // neither zeros nor with a NaN or infinity
  const F16 divisor = set1(is_usable ? size : 1.0f);
  const F16 factor = set1(is_usable ? 127.0f : 0.0f);
  alignas(64) int8_t bytes[kChunkK] = {};
  F16 total = set1(0.0f);
  for (int i = 0; i < num_k && is_usable; i += 16) {
    const F16 v = load_first(x + i, num_k - i < 16 ? num_k - i : 16, 0.0f);
    const F16 rounded = round_nearest(v / divisor * factor);
    total = total + rounded;
    store_bytes(bytes + i, to_int(rounded));
  }
  __builtin_memcpy(out, bytes, kChunkK);
  __builtin_memcpy(out + kChunkK / 4, &scale, sizeof(scale));
  const int start = kHasOffsetDot || kHasTiles ? -128 * static_cast<int>(reduce_add(total)) : 0;
  __builtin_memcpy(out + kChunkK / 4 + 1, &start, sizeof(start));
}

// One input row as `weights` multiplies it, in pieces `stride` words apart.
inline void pack_row(const float* x, int64_t k, DType weights, float* out, int64_t stride) {
  const int piece = row_layout(weights, 1).k;
  for (int64_t begin = 0; begin < k; begin += piece, out += stride) {
    const int num_k = k - begin < piece ? static_cast<int>(k - begin) : piece;
    if (weights == DType::kInt8) {
      pack_int8(x + begin, num_k, reinterpret_cast<uint32_t*>(out));
    } else if (weights == DType::kInt8Group) {
      pack_fixed<DType::kInt8Group>(x + begin, num_k, reinterpret_cast<uint32_t*>(out));
    } else if (is_grouped(weights)) {
      pack_fixed<DType::kInt4>(x + begin, num_k, reinterpret_cast<uint32_t*>(out));
    } else if (kRoundsToBf16 && weights == DType::kBFloat16) {
      pack_bf16<row_layout(DType::kBFloat16, 1).k>(x + begin, num_k,
                                                   reinterpret_cast<uint32_t*>(out));
    } else {
      pack_floats(x + begin, num_k, out);
    }
  }
}

alignas(64) inline constexpr uint32_t kHighHalves[16] = {
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

// How weights of a type are multiplied: one k at a time with floats, or depth_of(W) at a time with
// as many numbers in a word.
template <DType W>
struct Multiply {
  static constexpr bool kIsInteger = W == DType::kInt8;
  static constexpr bool kIsPacked = kIsInteger || (kHasBf16Dot && W == DType::kBFloat16);
  static constexpr int kRowWords = row_words(W);
  using Column = std::conditional_t<kIsPacked, U16, F16>;
  using Sum = std::conditional_t<kIsInteger, U16, F16>;

  static Sum start(const float* x) {
    if constexpr (kIsInteger) {
      return set1_u(reinterpret_cast<const uint32_t*>(x)[kChunkK / 4 + 1]);
    } else {
      return set1(0.0f);
    }
  }

  // Sixteen columns of the i-th k (or of all) of a step of depth_of(W).
  static Column load_column(const char* at, int i) {
    if constexpr (kIsPacked) {
      return load_words(at);
    } else if constexpr (W == DType::kFloat32) {
      return load(reinterpret_cast<const float*>(at));
    } else if constexpr (W == DType::kFloat16) {
      return load_fp16(reinterpret_cast<const uint16_t*>(at));
    } else {
      const U16 both = load_words(at);
      if (i == 0) return as_float(shift_left<16>(both));
      return as_float(both & load_words(forget(kHighHalves)));
    }
  }

  static Column load_factor(const float* x) {
    if constexpr (kIsPacked) {
      return set1_u(*reinterpret_cast<const uint32_t*>(x));
    } else {
      return set1(*x);
    }
  }

  static Sum add(Sum sum, Column column, Column factor) {
    if constexpr (kIsInteger) {
      return dot_int8(sum, column, factor);
    } else if constexpr (kIsPacked) {
      return dot_bf16(sum, column, factor);
    } else {
      return multiply_add(sum, column, factor);
    }
  }

  // The chunks before, and this one; `x` is its row.
  static F16 accumulate(F16 total, Sum sum, const float* x) {
    if constexpr (kIsInteger) {
      return total + from_int(sum) * set1(x[kChunkK / 4]);
    } else {
      return total + sum;
    }
  }
};

// totals[r][16 c …) += sum over k of x[r][k] * w[k][·] in the order of k, for R rows and 16 C
// columns of a panel's chunk. Asks for kLines cache lines a step from `ahead` on.
template <int R, int C, DType W, int kLines>
inline void multiply_block(const char* weights, const char* ahead, const float* x, int num_k,
                           float* totals) {
  using M = Multiply<W>;
  constexpr int kDepth = depth_of(W);
  constexpr int kNumParts = M::kIsPacked ? 1 : kDepth;
  constexpr int64_t kColumnBytes = kDepth * 16 * element_size(W);
  constexpr int64_t kStepBytes = kDepth * kPanelColumns * element_size(W);
  typename M::Sum sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = M::start(x + r * M::kRowWords);
  }
  const int num_steps = (num_k + kDepth - 1) / kDepth;
  for (int s = 0; s < num_steps; ++s) {
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(ahead + s * kStepBytes + 64 * line, 0, 2);
    }
    for (int i = 0; i < kNumParts; ++i) {
      const char* const w = weights + s * kStepBytes;
      const char* const at = i == 0 ? w : forget(w);
      const float* const factors = i == 0 ? x + s * kNumParts : forget(x + s * kNumParts) + i;
      typename M::Column columns[C];
      for (int c = 0; c < C; ++c) columns[c] = M::load_column(at + c * kColumnBytes, i);
      for (int r = 0; r < R; ++r) {
        const auto factor = M::load_factor(factors + r * M::kRowWords);
        for (int c = 0; c < C; ++c) sums[r][c] = M::add(sums[r][c], columns[c], factor);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* total = totals + r * kPanelColumns + c * 16;
      store(total, M::accumulate(load(total), sums[r][c], x + r * M::kRowWords));
    }
  }
}

template <int C, DType W, int kLines>
inline void multiply_rows(int num_rows, const char* weights, const char* ahead, const float* x,
                          int num_k, float* totals) {
#define SPECENGINE_BLOCK(R)                                              \
  case R:                                                                \
    if constexpr (is_block(R, C, W == DType::kInt8)) {                   \
      multiply_block<R, C, W, kLines>(weights, ahead, x, num_k, totals); \
    }                                                                    \
    break;
  switch (num_rows) {
    SPECENGINE_BLOCK(1)
    SPECENGINE_BLOCK(2)
    SPECENGINE_BLOCK(3)
    SPECENGINE_BLOCK(4)
    SPECENGINE_BLOCK(5)
    SPECENGINE_BLOCK(6)
  }
#undef SPECENGINE_BLOCK
}

// One chunk of a panel for every row, in blocks of rows. A single block streams the weights from
// memory as the processor's own prefetching does best. Where several share them, each asks for its
// part of the `next` chunk (null at a panel's end), so that memory never waits for arithmetic.
template <int C, DType W>
inline void multiply_chunk(int num_rows, const char* weights, const char* next, const float* x,
                           int num_k, float* totals) {
  constexpr int64_t kColumnBytes = depth_of(W) * element_size(W);
  constexpr int kStepLines = C * 16 * static_cast<int>(kColumnBytes) / 64;
  const int num_blocks = (num_rows + kMaxBlockRows - 1) / kMaxBlockRows;
  const bool is_asking = next != nullptr && num_blocks > 1;
  for (int column = 0; column < kPanelColumns; column += C * 16) {
    const char* group = weights + column * kColumnBytes;
    int row = 0;
    for (int block = 0; block < num_blocks; ++block) {
      const int end = num_rows * (block + 1) / num_blocks;
      const int first_line = kStepLines * block / num_blocks;
      const int num_lines = kStepLines * (block + 1) / num_blocks - first_line;
      const char* ahead = next + column * kColumnBytes + 64 * first_line;
      const float* rows = x + row * row_words(W);
      float* sums = totals + row * kPanelColumns + column;
      if (!is_asking || num_lines == 0) {
        multiply_rows<C, W, 0>(end - row, group, nullptr, rows, num_k, sums);
      } else if (num_lines == 1) {
        multiply_rows<C, W, 1>(end - row, group, ahead, rows, num_k, sums);
      } else {
        multiply_rows<C, W, 2>(end - row, group, ahead, rows, num_k, sums);
      }
      row = end;
    }
  }
}

// Sums of up to sixteen columns to outputs, but for the activation.
class FinishColumns {
 public:
  FinishColumns(const LinearArgs& args, int64_t column, int count)
      : scale_(args.scale == nullptr ? set1(1.0f) : load_first(args.scale + column, count, 0.0f)),
        bias_(args.bias == nullptr ? set1(-0.0f) : load_first(args.bias + column, count, 0.0f)) {}

  F16 operator()(const float* sums) const { return load(sums) * scale_ + bias_; }

 private:
  F16 scale_, bias_;
};

// Of kSwiglu: pairs of columns to one.
inline void store_gated_panel(const LinearArgs& args, int64_t first_row, int num_rows,
                              int64_t column, const float* totals) {
  alignas(64) float values[kPanelColumns], gates[kPanelColumns / 2], factors[kPanelColumns / 2];
  const int64_t left = args.num_columns - column;
  const int count = left < kPanelColumns ? static_cast<int>(left) : kPanelColumns;
  for (int r = 0; r < num_rows; ++r) {
    for (int c = 0; c < count; c += 16) {
      const FinishColumns finish(args, column + c, count - c < 16 ? count - c : 16);
      store(values + c, finish(totals + r * kPanelColumns + c));
    }
    for (int i = 0; i < kPanelColumns / 2; ++i) {
      gates[i] = values[2 * i];
      factors[i] = values[2 * i + 1];
    }
    float* out = args.out + (first_row + r) * args.out_stride + (column - args.first_column) / 2;
    for (int c = 0; c < count / 2; c += 16) {
      const int n = count / 2 - c < 16 ? count / 2 - c : 16;
      store_first(out + c, silu(load(gates + c)) * load(factors + c), n);
    }
  }
}

template <Activation kActivation>
inline void store_active_panel(const LinearArgs& args, int64_t first_row, int num_rows,
                               int64_t column, const float* totals) {
  for (int c = 0; c < kPanelColumns && column < args.num_columns; c += 16, column += 16) {
    const int64_t left = args.num_columns - column;
    const int n = left < 16 ? static_cast<int>(left) : 16;
    const FinishColumns finish(args, column, n);
    const float* sums = totals + c;
    float* out = args.out + first_row * args.out_stride + column - args.first_column;
    const float* residual =
        args.residual == nullptr ? nullptr : args.residual + first_row * args.num_columns + column;
    for (int r = 0; r < num_rows; ++r, sums += kPanelColumns, out += args.out_stride) {
      F16 y = activate(finish(sums), kActivation);
      if (residual != nullptr) {
        y = (n == 16 ? load(residual) : load_first(residual, n, 0.0f)) + y;
        residual += args.num_columns;
      }
      if (n == 16) {
        store(out, y);
      } else {
        store_first(out, y, n);
      }
    }
  }
}

// A panel's rows, of which `column` is the first.
inline void store_panel(const LinearArgs& args, int64_t first_row, int num_rows, int64_t column,
                        const float* totals) {
  switch (args.activation) {
    case Activation::kNone:
      return store_active_panel<Activation::kNone>(args, first_row, num_rows, column, totals);
    case Activation::kRelu:
      return store_active_panel<Activation::kRelu>(args, first_row, num_rows, column, totals);
    case Activation::kGelu:
      return store_active_panel<Activation::kGelu>(args, first_row, num_rows, column, totals);
    case Activation::kGeluTanh:
      return store_active_panel<Activation::kGeluTanh>(args, first_row, num_rows, column, totals);
    case Activation::kSwiglu:
      return store_gated_panel(args, first_row, num_rows, column, totals);
  }
}

// Of a pass: one chunk of the weights, at `chunk`, for every row; `next` is the chunk after it, or
// null.
template <DType W>
inline void add_chunk(int num_rows, const char* chunk, const char* next, const float* x, int num_k,
                      float* totals) {
  switch (column_vectors(num_rows, W == DType::kInt8)) {
    case 4:
      return multiply_chunk<4, W>(num_rows, chunk, next, x, num_k, totals);
    case 2:
      return multiply_chunk<2, W>(num_rows, chunk, next, x, num_k, totals);
    default:
      return multiply_chunk<1, W>(num_rows, chunk, next, x, num_k, totals);
  }
}

// Calls add(num_rows, x, totals) for the rows of one pass after the other, and makes outputs of the
// totals.
template <class Add>
inline void for_each_pass(const LinearArgs& args, int64_t panel, const Add& add) {
  const RowLayout layout = row_layout(args.dtype, args.num_rows);
  alignas(64) float totals[kMaxPassRows * kPanelColumns];
  for (int64_t pass = 0; pass < args.num_rows; pass += kMaxPassRows) {
    const int64_t left = args.num_rows - pass;
    const int num_rows = left < kMaxPassRows ? static_cast<int>(left) : kMaxPassRows;
    add(num_rows, args.x + layout.begin(pass, args.k), totals);
    store_panel(args, pass, num_rows, panel * kPanelColumns, totals);
  }
}

template <DType W>
inline void linear_panel_of(const LinearArgs& args, int64_t panel) {
  const char* weights = static_cast<const char*>(args.panels) + panel * panel_bytes(args.k, W);
  const auto add = [&](int num_rows, const float* x, float* totals) {
    __builtin_memset(totals, 0, sizeof(float) * num_rows * kPanelColumns);
    for (int64_t begin = 0; begin < args.k; begin += kChunkK, x += args.num_rows * row_words(W)) {
      const int num_k = args.k - begin < kChunkK ? static_cast<int>(args.k - begin) : kChunkK;
      const char* chunk = weights + panel_bytes(begin, W);
      if constexpr (is_grouped(W)) {
        add_grouped_chunk<W>(num_rows, chunk, x, num_k, totals);
      } else {
        const char* next = begin + kChunkK < args.k ? chunk + panel_bytes(kChunkK, W) : nullptr;
        add_chunk<W>(num_rows, chunk, next, x, num_k, totals);
      }
    }
  };
  for_each_pass(args, panel, add);
}

template <DType W>
inline void linear_panels_of(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) linear_panel_of<W>(args, panel);
}

inline void linear_panels(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
#define SPECENGINE_WEIGHTS(W) \
  case DType::W:              \
    return linear_panels_of<DType::W>(args, begin, end);
    SPECENGINE_WEIGHTS(kFloat32)
    SPECENGINE_WEIGHTS(kBFloat16)
    SPECENGINE_WEIGHTS(kFloat16)
    SPECENGINE_WEIGHTS(kInt8)
    SPECENGINE_WEIGHTS(kInt4)
    SPECENGINE_WEIGHTS(kInt4Min)
    SPECENGINE_WEIGHTS(kInt8Group)
#undef SPECENGINE_WEIGHTS
  }
}
