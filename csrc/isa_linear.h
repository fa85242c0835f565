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

// totals[r][0 … 16 C) += sum over k of x[r][k] * w[k][·], the sum in the order of k.
template <int R, int C, DType W>
inline void multiply_chunk(const char* weights, const float* x, int64_t x_stride, int num_k,
                           float* totals) {
  F16 sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = set1(0.0f);
  }
  if constexpr (W == DType::kBFloat16) {
    const auto* w = reinterpret_cast<const uint16_t*>(weights);
    for (int k = 0; k < num_k; k += 2, w += 2 * kPanelColumns) {
      F16 columns[C];
      for (int c = 0; c < C; ++c) columns[c] = as_float(shift_left<16>(load_pairs(w + 32 * c)));
      for (int r = 0; r < R; ++r) {
        const F16 scalar = set1(x[r * x_stride + k]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma(scalar, columns[c], sums[r][c]);
      }
      for (int c = 0; c < C; ++c) {
        columns[c] = as_float(load_pairs(w + 32 * c) & set1_u(0xffff0000));
      }
      for (int r = 0; r < R; ++r) {
        const F16 scalar = set1(x[r * x_stride + k + 1]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma(scalar, columns[c], sums[r][c]);
      }
    }
  } else {
    for (int k = 0; k < num_k; ++k) {
      F16 columns[C];
      for (int c = 0; c < C; ++c) {
        const int64_t at = int64_t{k} * kPanelColumns + 16 * c;
        if constexpr (W == DType::kFloat32) {
          columns[c] = load(reinterpret_cast<const float*>(weights) + at);
        } else {
          columns[c] = load_fp16(reinterpret_cast<const uint16_t*>(weights) + at);
        }
      }
      for (int r = 0; r < R; ++r) {
        const F16 scalar = set1(x[r * x_stride + k]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma(scalar, columns[c], sums[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* total = totals + r * kPanelColumns + 16 * c;
      store(total, load(total) + sums[r][c]);
    }
  }
}

template <int R, DType W>
inline void multiply_rows(const char* weights, const float* x, int64_t x_stride, int num_k,
                          float* totals) {
  constexpr int C = column_vectors(R);
  // A column step is 16 columns of the innermost row: 16 floats, 16 halves, or 16 pairs of bf16.
  constexpr int kStep = W == DType::kFloat16 ? 32 : 64;
  for (int c = 0; c < kPanelColumns / 16; c += C) {
    multiply_chunk<R, C, W>(weights + c * kStep, x, x_stride, num_k, totals + 16 * c);
  }
}

template <DType W>
inline void multiply_block(int num_rows, const char* weights, const float* x, int64_t x_stride,
                           int num_k, float* totals) {
  static_assert(kMaxBlockRows <= 6);
  switch (num_rows) {
    case 1:
      return multiply_rows<1, W>(weights, x, x_stride, num_k, totals);
    case 2:
      return multiply_rows<2, W>(weights, x, x_stride, num_k, totals);
    case 3:
      return multiply_rows<3, W>(weights, x, x_stride, num_k, totals);
    case 4:
      return multiply_rows<4, W>(weights, x, x_stride, num_k, totals);
    case 5:
      return multiply_rows<5, W>(weights, x, x_stride, num_k, totals);
    default:
      return multiply_rows<6, W>(weights, x, x_stride, num_k, totals);
  }
}

inline void store_panel_row(const LinearArgs& args, int64_t row, int64_t column,
                            const float* totals) {
  for (int c = 0; c < kPanelColumns && column < args.num_columns; c += 16, column += 16) {
    const int64_t left = args.num_columns - column;
    const int n = left < 16 ? static_cast<int>(left) : 16;
    F16 y = load(totals + c);
    if (args.bias != nullptr) y = y + load_first(args.bias + column, n, 0.0f);
    y = activate(y, args.activation);
    if (args.residual != nullptr) {
      y = load_first(args.residual + row * args.num_columns + column, n, 0.0f) + y;
    }
    store_first(args.out + row * args.out_stride + column - args.first_column, y, n);
  }
}

template <DType W>
inline void linear_panel_of(const LinearArgs& args, int64_t panel) {
  const int64_t k = W == DType::kBFloat16 ? (args.k + 1) / 2 * 2 : args.k;
  const int64_t row_bytes = kPanelColumns * element_size(W);
  const char* weights = static_cast<const char*>(args.panels) + panel * k * row_bytes;
  alignas(64) float totals[kMaxPassRows * kPanelColumns];
  for (int64_t pass = 0; pass < args.num_rows; pass += kMaxPassRows) {
    const int64_t left = args.num_rows - pass;
    const int num_rows = left < kMaxPassRows ? static_cast<int>(left) : kMaxPassRows;
    __builtin_memset(totals, 0, sizeof(float) * num_rows * kPanelColumns);
    const int num_blocks = (num_rows + kMaxBlockRows - 1) / kMaxBlockRows;
    for (int64_t begin = 0; begin < k; begin += kChunkK) {
      const int num_k = k - begin < kChunkK ? static_cast<int>(k - begin) : kChunkK;
      int row = 0;
      for (int block = 0; block < num_blocks; ++block) {
        const int next = num_rows * (block + 1) / num_blocks;
        multiply_block<W>(next - row, weights + begin * row_bytes,
                          args.x + (pass + row) * args.x_stride + begin, args.x_stride, num_k,
                          totals + row * kPanelColumns);
        row = next;
      }
    }
    for (int row = 0; row < num_rows; ++row) {
      store_panel_row(args, pass + row, panel * kPanelColumns, totals + row * kPanelColumns);
    }
  }
}

inline void linear_panel(const LinearArgs& args, int64_t panel) {
  switch (args.dtype) {
    case DType::kFloat32:
      return linear_panel_of<DType::kFloat32>(args, panel);
    case DType::kBFloat16:
      return linear_panel_of<DType::kBFloat16>(args, panel);
    case DType::kFloat16:
      return linear_panel_of<DType::kFloat16>(args, panel);
  }
}
