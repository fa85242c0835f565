// Products with weights by group, whose numbers are made in registers as they are needed. Included
// inside an instruction set's namespace.

// A group's scales and minima of 16 C columns.
template <int C, DType W>
struct GroupScales {
  F16 scale[C], minimum[C];

  GroupScales(const char* group, int column) {
    const auto* halves = reinterpret_cast<const uint16_t*>(group) + column;
    for (int c = 0; c < C; ++c) {
      scale[c] = load_fp16(halves + 16 * c);
      minimum[c] = W == DType::kInt4Min ? load_fp16(halves + kPanelColumns + 16 * c) : scale[c];
    }
  }

  // The weights themselves: the product is exact, and with a minimum the sum is rounded once.
  F16 weight(int c, F16 code) const {
    return W == DType::kInt4Min ? fma(code, scale[c], minimum[c]) : code * scale[c];
  }
};

// Calls use(i, c, weights of 16 columns) for eight k and C vectors of columns, k by k; `codes` are
// those of the first k and column.
template <DType W, int C, class Use, int... I>
[[gnu::always_inline]] inline void expand_eight(const char* codes, const GroupScales<C, W>& scales,
                                                const Use& use, std::integer_sequence<int, I...>) {
  if constexpr (W == DType::kInt8Group) {
    const auto* bytes = reinterpret_cast<const int8_t*>(codes);
    const auto step = [&](int i) __attribute__((always_inline)) {
      for (int c = 0; c < C; ++c) {
        use(i, c, scales.weight(c, load_int8(bytes + i * kPanelColumns + 16 * c)));
      }
    };
    (step(I), ...);
  } else {
    U16 words[C];
    for (int c = 0; c < C; ++c) words[c] = load_words(codes + 64 * c);
    constexpr bool kIsSigned = W == DType::kInt4;
    const auto step = [&]<int kIndex>() __attribute__((always_inline)) {
      for (int c = 0; c < C; ++c) {
        use(kIndex, c, scales.weight(c, nibble<kIndex, kIsSigned>(words[c])));
      }
    };
    (step.template operator()<I>(), ...);
  }
}

// Of a group: use(k, c, weights of 16 columns) for 16 C columns from `column` on, k by k.
template <DType W, int C, class Use>
[[gnu::always_inline]] inline void expand_group(const char* group, int column, const Use& use) {
  constexpr int64_t kEightBytes = 8 * kPanelColumns / (W == DType::kInt8Group ? 1 : 2);
  const GroupScales<C, W> scales(group, column);
  const char* codes = group + group_header_bytes(W) + column * (W == DType::kInt8Group ? 1 : 4);
  for (int64_t k = 0; k < kGroupK; k += 8, codes += kEightBytes) {
    expand_eight<W, C>(
        codes, scales,
        [&](int i, int c, F16 weights) __attribute__((always_inline)) { use(k + i, c, weights); },
        std::make_integer_sequence<int, 8>{});
  }
}

// totals[r][·] += one chunk's sums, as multiply_block has them for fp32 weights, in R rows and 16 C
// columns from `column` on.
template <int R, int C, DType W>
inline void multiply_grouped_block(const char* groups, int column, const float* x, int num_k,
                                   float* totals) {
  F16 sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = set1(0.0f);
  }
  for (int64_t begin = 0; begin < num_k; begin += kGroupK, groups += group_bytes(W)) {
    expand_group<W, C>(
        groups, column, [&](int64_t k, int c, F16 weights) __attribute__((always_inline)) {
          for (int r = 0; r < R; ++r) {
            sums[r][c] = multiply_add(sums[r][c], weights, set1(x[r * kChunkK + begin + k]));
          }
        });
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* total = totals + r * kPanelColumns + column + 16 * c;
      store(total, load(total) + sums[r][c]);
    }
  }
}

// One chunk of a panel for at most kMaxBlockRows rows.
template <DType W>
inline void multiply_grouped_rows(int num_rows, const char* groups, const float* x, int num_k,
                                  float* totals) {
#define SPECENGINE_BLOCK(R)                                                       \
  case R:                                                                         \
    if constexpr (R <= kMaxBlockRows) {                                           \
      constexpr int kVectors = grouped_vectors(R);                                \
      for (int column = 0; column < kPanelColumns; column += 16 * kVectors) {     \
        multiply_grouped_block<R, kVectors, W>(groups, column, x, num_k, totals); \
      }                                                                           \
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

// A chunk's weights as a panel of fp32 weights has them, asking for the next chunk (or null).
template <DType W>
inline void expand_chunk(const char* groups, const char* next, int num_k, float* out) {
  for (int begin = 0; begin < num_k; begin += kGroupK, groups += group_bytes(W)) {
    for (int64_t at = 0; next != nullptr && at < group_bytes(W); at += 64) {
      __builtin_prefetch(next + at, 0, 2);
    }
    if (next != nullptr) next += group_bytes(W);
    for (int column = 0; column < kPanelColumns; column += 16) {
      float* first = out + begin * kPanelColumns + column;
      expand_group<W, 1>(groups, column,
                         [&](int64_t k, int, F16 weights) __attribute__((always_inline)) {
                           store(first + k * kPanelColumns, weights);
                         });
    }
  }
}
