// LayerNorm of one row and one panel of a linear layer. Included inside an instruction set's
// namespace.

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       int64_t size, float* out) {
  const int64_t whole = size / 16 * 16;
  const int rest = static_cast<int>(size - whole);
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < whole; i += 16) sum = sum + load(x + i);
  if (rest > 0) sum = sum + load_first(x + whole, rest, 0.0f);
  const float mean = reduce_add(sum) / static_cast<float>(size);
  F16 squares = set1(0.0f);
  for (int64_t i = 0; i < whole; i += 16) {
    const F16 centred = load(x + i) - set1(mean);
    squares = fma(centred, centred, squares);
  }
  if (rest > 0) {
    const F16 centred = load_first(x + whole, rest, mean) - set1(mean);
    squares = fma(centred, centred, squares);
  }
  const float variance = reduce_add(squares) / static_cast<float>(size);
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

// x / scale to int16, two to a word; scale = max |x| / 32767, and NaN for a row that is not finite.
inline float quantize_row(const float* x, int64_t k, uint32_t* out, int64_t chunk_stride) {
  F16 largest = set1(0.0f), poison = set1(0.0f);
  for (int64_t i = 0; i < k; i += 16) {
    const F16 v = load_first(x + i, k - i < 16 ? static_cast<int>(k - i) : 16, 0.0f);
    largest = maximum(largest, maximum(v, set1(0.0f) - v));
    poison = fma(v, set1(0.0f), poison);
  }
  const float size = reduce_max(largest);
  const float scale = size / 32767.0f + reduce_add(poison);
  const bool is_zero = !(size > 0.0f) || !(scale >= 0.0f);
  const F16 divisor = set1(is_zero ? 1.0f : size);
  const F16 factor = set1(is_zero ? 0.0f : 32767.0f);
  for (int64_t i = 0; i < k; i += 16) {
    const int n = k - i < 16 ? static_cast<int>(k - i) : 16;
    U16 words = set1_u(0);
    if (!is_zero) words = to_int(round_nearest(load_first(x + i, n, 0.0f) / divisor * factor));
    alignas(64) uint32_t lanes[16];
    store(lanes, words);
    uint32_t* pairs = out + i / kChunkK * chunk_stride + i % kChunkK / 2;
    for (int p = 0; p < (n + 1) / 2; ++p) {
      pairs[p] = (lanes[2 * p] & 0xffff) | (lanes[2 * p + 1] << 16);
    }
  }
  return scale;
}

// One input row as `weights` multiplies it, in chunks `chunk_stride` words apart (kernels.h).
// Returns the row's scale.
inline float pack_row(const float* x, int64_t k, DType weights, void* out, int64_t chunk_stride) {
  if (weights == DType::kInt8) {
    return quantize_row(x, k, static_cast<uint32_t*>(out), chunk_stride);
  }
  for (int64_t begin = 0; begin < k; begin += kChunkK) {
    const int num_k = k - begin < kChunkK ? static_cast<int>(k - begin) : kChunkK;
    if (kHasBf16Dot && weights == DType::kBFloat16) {
      auto* pairs = static_cast<uint32_t*>(out) + begin / kChunkK * chunk_stride;
      for (int i = 0; i + 1 < num_k; i += 2) {
        const uint32_t high = float_to_bf16(x[begin + i + 1]);
        pairs[i / 2] = float_to_bf16(x[begin + i]) | (high << 16);
      }
      if (num_k % 2 != 0) pairs[num_k / 2] = float_to_bf16(x[begin + num_k - 1]);
    } else {
      float* chunk = static_cast<float*>(out) + begin / kChunkK * chunk_stride;
      __builtin_memcpy(chunk, x + begin, sizeof(float) * num_k);
      if (num_k % 2 != 0) chunk[num_k] = 0.0f;
    }
  }
  return 1.0f;
}

// The compiler forgets what it loaded from here: registers are for the sums.
template <class T>
inline T* forget(T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

alignas(64) inline constexpr uint32_t kHighHalves[16] = {
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

// How weights of a type are multiplied: one k at a time with floats, or in pairs with pairs.
template <DType W>
struct Multiply {
  static constexpr bool kIsInteger = W == DType::kInt8;
  static constexpr bool kIsPaired = kIsInteger || (kHasBf16Dot && W == DType::kBFloat16);
  using Column = std::conditional_t<kIsPaired, U16, F16>;
  using Sum = std::conditional_t<kIsInteger, U16, F16>;

  static Sum zero() { return Sum{}; }

  // Sixteen columns of the i-th k (or of both) of a step of depth_of(W).
  static Column load_column(const char* at, int i) {
    if constexpr (kIsInteger) {
      return load_int8_pairs(reinterpret_cast<const int8_t*>(at));
    } else if constexpr (kIsPaired) {
      return load_pairs(reinterpret_cast<const uint16_t*>(at));
    } else if constexpr (W == DType::kFloat32) {
      return load(reinterpret_cast<const float*>(at));
    } else if constexpr (W == DType::kFloat16) {
      return load_fp16(reinterpret_cast<const uint16_t*>(at));
    } else {
      const U16 both = load_pairs(reinterpret_cast<const uint16_t*>(at));
      if (i == 0) return as_float(shift_left<16>(both));
      return as_float(both & load_pairs(reinterpret_cast<const uint16_t*>(forget(kHighHalves))));
    }
  }

  static Column load_factor(const float* x) {
    if constexpr (kIsPaired) {
      return set1_u(*reinterpret_cast<const uint32_t*>(x));
    } else {
      return set1(*x);
    }
  }

  static Sum add(Sum sum, Column column, Column factor) {
    if constexpr (kIsInteger) {
      return dot_int16(sum, column, factor);
    } else if constexpr (kIsPaired) {
      return dot_bf16(sum, column, factor);
    } else {
      return multiply_add(sum, column, factor);
    }
  }

  static F16 to_float(Sum sum) {
    if constexpr (kIsInteger) {
      return from_int(sum);
    } else {
      return sum;
    }
  }
};

// totals[r][16 c …) += sum over k of x[r][k] * w[k][·] in the order of k, for R rows and C
// sub-panels. Asks for the weights `ahead` bytes further on.
template <int R, int C, DType W>
inline void multiply_block(const char* weights, int64_t sub_panel_bytes, int64_t ahead,
                           const float* x, int num_k, float* totals) {
  using M = Multiply<W>;
  constexpr int kDepth = depth_of(W);
  constexpr int kNumParts = M::kIsPaired ? 1 : kDepth;
  constexpr int64_t kStepBytes = kDepth * kSubPanelColumns * element_size(W);
  typename M::Sum sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = M::zero();
  }
  const char* const end = weights + (num_k + kDepth - 1) / kDepth * kStepBytes;
  for (const char* w = weights; w != end; w += kStepBytes, x += kNumParts) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(w + c * sub_panel_bytes + ahead);
    for (int i = 0; i < kNumParts; ++i) {
      const char* const at = i == 0 ? w : forget(w);
      const float* const factors = i == 0 ? x : forget(x) + i;
      typename M::Column columns[C];
      for (int c = 0; c < C; ++c) columns[c] = M::load_column(at + c * sub_panel_bytes, i);
      for (int r = 0; r < R; ++r) {
        const auto factor = M::load_factor(factors + r * kChunkK);
        for (int c = 0; c < C; ++c) sums[r][c] = M::add(sums[r][c], columns[c], factor);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* total = totals + r * kPanelColumns + c * kSubPanelColumns;
      store(total, load(total) + M::to_float(sums[r][c]));
    }
  }
}

template <int C, DType W>
inline void multiply_rows(int num_rows, const char* weights, int64_t sub_panel_bytes, int64_t ahead,
                          const float* x, int num_k, float* totals) {
#define SPECENGINE_BLOCK(R)                                                       \
  case R:                                                                         \
    if constexpr (is_block(R, C, W == DType::kInt8)) {                            \
      multiply_block<R, C, W>(weights, sub_panel_bytes, ahead, x, num_k, totals); \
    }                                                                             \
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

// One chunk of a panel for every row: each group of C sub-panels is read from memory once, while
// the group before it is multiplied, and stays in the nearest cache for all row blocks. `next` is
// the chunk after this one.
template <int C, DType W>
inline void multiply_chunk(int num_rows, const char* weights, const char* next, const float* x,
                           int num_k, float* totals) {
  const int depth = (num_k + depth_of(W) - 1) / depth_of(W) * depth_of(W);
  const int64_t sub_panel_bytes = depth * kSubPanelColumns * element_size(W);
  const int num_blocks = (num_rows + kMaxBlockRows - 1) / kMaxBlockRows;
  for (int column = 0; column < kPanelColumns; column += C * kSubPanelColumns) {
    const char* group = weights + column / kSubPanelColumns * sub_panel_bytes;
    const bool is_last = column + C * kSubPanelColumns == kPanelColumns;
    const int64_t ahead = is_last ? next - group : C * sub_panel_bytes;
    int row = 0;
    for (int block = 0; block < num_blocks; ++block) {
      const int end = num_rows * (block + 1) / num_blocks;
      multiply_rows<C, W>(end - row, group, sub_panel_bytes, block == 0 ? ahead : 0,
                          x + row * kChunkK, num_k, totals + row * kPanelColumns + column);
      row = end;
    }
  }
}

inline void store_panel_row(const LinearArgs& args, int64_t row, int64_t column,
                            const float* totals) {
  for (int c = 0; c < kPanelColumns && column < args.num_columns; c += 16, column += 16) {
    const int64_t left = args.num_columns - column;
    const int n = left < 16 ? static_cast<int>(left) : 16;
    F16 y = load(totals + c);
    if (args.scale != nullptr) {
      y = y * (set1(args.row_scales[row]) * load_first(args.scale + column, n, 0.0f));
    }
    if (args.bias != nullptr) y = y + load_first(args.bias + column, n, 0.0f);
    y = activate(y, args.activation);
    if (args.residual != nullptr) {
      y = load_first(args.residual + row * args.num_columns + column, n, 0.0f) + y;
    }
    store_first(args.out + row * args.out_stride + column - args.first_column, y, n);
  }
}

template <DType W>
inline void linear_panel_of(const LinearArgs& args, int64_t panel, int64_t next_panel) {
  constexpr int64_t kRowBytes = kPanelColumns * element_size(W);
  const int64_t panel_bytes = (args.k + depth_of(W) - 1) / depth_of(W) * depth_of(W) * kRowBytes;
  const char* weights = static_cast<const char*>(args.panels) + panel * panel_bytes;
  alignas(64) float totals[kMaxPassRows * kPanelColumns];
  for (int64_t pass = 0; pass < args.num_rows; pass += kMaxPassRows) {
    const int64_t left = args.num_rows - pass;
    const int num_rows = left < kMaxPassRows ? static_cast<int>(left) : kMaxPassRows;
    __builtin_memset(totals, 0, sizeof(float) * num_rows * kPanelColumns);
    for (int64_t begin = 0; begin < args.k; begin += kChunkK) {
      const int num_k = args.k - begin < kChunkK ? static_cast<int>(args.k - begin) : kChunkK;
      const float* x = args.x + begin * args.num_rows + pass * kChunkK;
      const char* chunk = weights + begin * kRowBytes;
      const bool is_last = begin + kChunkK >= args.k;
      const char* next =
          is_last ? weights + (next_panel - panel) * panel_bytes : chunk + kChunkK * kRowBytes;
      switch (column_vectors(num_rows, W == DType::kInt8)) {
        case 4:
          multiply_chunk<4, W>(num_rows, chunk, next, x, num_k, totals);
          break;
        case 2:
          multiply_chunk<2, W>(num_rows, chunk, next, x, num_k, totals);
          break;
        default:
          multiply_chunk<1, W>(num_rows, chunk, next, x, num_k, totals);
      }
    }
    for (int row = 0; row < num_rows; ++row) {
      store_panel_row(args, pass + row, panel * kPanelColumns, totals + row * kPanelColumns);
    }
  }
}

// `next_panel`: what this thread will probably ask for next.
inline void linear_panel(const LinearArgs& args, int64_t panel, int64_t next_panel) {
  switch (args.dtype) {
    case DType::kFloat32:
      return linear_panel_of<DType::kFloat32>(args, panel, next_panel);
    case DType::kBFloat16:
      return linear_panel_of<DType::kBFloat16>(args, panel, next_panel);
    case DType::kFloat16:
      return linear_panel_of<DType::kFloat16>(args, panel, next_panel);
    case DType::kInt8:
      return linear_panel_of<DType::kInt8>(args, panel, next_panel);
  }
}
