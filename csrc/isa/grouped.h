// Products with weights by group: rows meet them as fixed-point numbers of 23 bits with a scale for
// each kGroupK, and a group's sum is one exact integer. Included inside an instruction set's
// namespace.

// A group of a row, in words: digits, then what follows them. A number is the sum of digit i times
// 256^i: three signed bytes, four to a word, or (wide digits) a signed byte and the rest, both in
// 16 bits, two to a word as CodeSum likes to multiply them.
template <DType W>
struct FixedGroup {
  using Sum = CodeSum<W == DType::kInt8Group ? 8 : 4>;
  static constexpr bool kHasWideDigits = Sum::kHasWideDigits;
  static constexpr int kDigits = kHasWideDigits ? 2 : 3;
  static constexpr int kDigitWords = kGroupK / (kHasWideDigits ? 2 : 4);
  static constexpr int kScale = kDigits * kDigitWords;  // float: what an integer stands for
  static constexpr int kSum = kScale + 1;               // float: the sum of the group
  // What sums of the lowest digits, and of the next, start from: together, with the place of their
  // digits, -code_offset times the sum of the integers.
  static constexpr int kStart = kSum + 1;
  static constexpr int kWords = (kStart + 2 + 7) / 8 * 8;
  static constexpr int kRowWords = kChunkK / kGroupK * kWords;
};
constexpr int fixed_row_words(DType weights) {
  return weights == DType::kInt8Group ? FixedGroup<DType::kInt8Group>::kRowWords
                                      : FixedGroup<DType::kInt4>::kRowWords;
}
// The largest whose digits are bytes (0x7f7f7f) and that round_nearest knows on every processor.
constexpr float kLargestFixed = 0x3f7f7f;

// Sixteen numbers, from `first` of their group on.
template <DType W>
inline void store_digits(U16 numbers, int first, uint32_t* out) {
  using Group = FixedGroup<W>;
  auto* bytes = reinterpret_cast<int8_t*>(out);
  if constexpr (Group::kHasWideDigits) {
    alignas(64) uint32_t values[16];
    store(values, numbers);
    int16_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      constexpr int kPlaces[4] = {0, 2, 1, 3};
      const int at = i / 4 * 4 + kPlaces[i % 4];
      low[at] = static_cast<int8_t>(values[i]);
      high[at] = static_cast<int16_t>((static_cast<int32_t>(values[i]) - low[at]) / 256);
    }
    __builtin_memcpy(bytes + 2 * first, low, sizeof(low));
    __builtin_memcpy(bytes + 4 * Group::kDigitWords + 2 * first, high, sizeof(high));
  } else {
    // A number plus 128 in each digit has the digits plus 128, none of them negative.
    const U16 digits = (numbers + set1_u(0x808080)) ^ set1_u(0x808080);
    store_bytes(bytes + first, digits);
    store_bytes(bytes + kGroupK + first, shift_right<8>(digits));
    store_bytes(bytes + 2 * kGroupK + first, shift_right<16>(digits));
  }
}

template <DType W>
inline void pack_fixed_group(const float* x, uint32_t* out) {
  using Group = FixedGroup<W>;
  const F16 values[2] = {load(x), load(x + 16)};
  F16 largest = set1(0.0f), poison = set1(0.0f);
  for (const F16 v : values) {
    largest = maximum(largest, maximum(v, set1(0.0f) - v));
    poison = fma(v, set1(0.0f), poison);
  }
  const float size = reduce_max(largest);
  const float scale = size / kLargestFixed + reduce_add(poison);
  // Neither with a NaN or infinity, nor zeros or what is so small that a sum of it counts for
  // nothing.
  const bool is_usable = size > 1e-30f && scale > 0.0f;
  const F16 factor = set1(is_usable ? kLargestFixed / size : 0.0f);
  U16 total = set1_u(0);
  for (int i = 0; i < 2; ++i) {
    const F16 v = is_usable ? values[i] : set1(0.0f);
    const U16 numbers = to_int(round_nearest(v * factor));
    total = total + numbers;
    store_digits<W>(numbers, 16 * i, out);
  }
  const int64_t sum = reduce_add(total);
  const float float_sum = static_cast<float>(sum) * scale;
  __builtin_memcpy(out + Group::kScale, &scale, sizeof(scale));
  __builtin_memcpy(out + Group::kSum, &float_sum, sizeof(float_sum));
  const int64_t start = -code_offset(W) * sum;
  const auto low = static_cast<int8_t>(start);
  out[Group::kStart] = static_cast<uint32_t>(low);
  out[Group::kStart + 1] = static_cast<uint32_t>((start - low) / 256);
}

template <DType W>
inline void pack_fixed(const float* x, int num_k, uint32_t* out) {
  for (int begin = 0; begin < num_k; begin += kGroupK, out += FixedGroup<W>::kWords) {
    pack_fixed_group<W>(x + begin, out);
  }
}

// The compiler forgets what it loaded from here: registers are for the sums.
template <class T>
inline T* forget(T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// How far ahead of the arithmetic the first rows that meet a group ask for another, across panels:
// they follow each other.
constexpr int64_t kPrefetchedGroups = kHasTiles ? 2 : 4;

// Sixteen columns' scales of a group.
template <DType W>
struct GroupScales {
  F16 scale, centre;

  GroupScales(const char* group, int column) {
    const auto* scales = reinterpret_cast<const uint16_t*>(group) + column;
    scale = centre = load_fp16(scales);
    if (W == DType::kInt4Min) {
      centre = fma(scale, set1(8.0f), load_fp16(scales + kPanelColumns));
    }
  }

  // total += a row's part of the group, of which `low` is the sum of the products with the lowest
  // digits and `high` with the others.
  void add(U16 low, U16 high, const float* row, float* at) const {
    // With codes of 4 bits the whole sum has 31 bits.
    const F16 value = W == DType::kInt8Group ? fma(from_int(high), set1(256.0f), from_int(low))
                                             : from_int(shift_left<8>(high) + low);
    F16 total = fma(scale, value * set1(row[FixedGroup<W>::kScale]), load(at));
    if (W == DType::kInt4Min) total = fma(centre, set1(row[FixedGroup<W>::kSum]), total);
    store(at, total);
  }
};

// totals[r][·] += a group's sums, in R rows and 16 C columns from `column` on.
template <int R, int C, DType W, bool kIsAsking>
inline void multiply_group(const char* group, int column, const float* x, float* totals) {
  using Group = FixedGroup<W>;
  using Sum = typename Group::Sum;
  constexpr bool kIsByte = W == DType::kInt8Group;
  constexpr int kQuads = kIsByte ? 1 : 2;  // of a column in a vector of codes
  const char* codes = group + group_header_bytes(W) + 4 * column;
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  Sum sums[R][Group::kDigits][C];
  // Unrolled, so that sums are registers: GCC keeps an array that a loop is left to in memory.
#pragma GCC unroll 8
  for (int quad = 0; quad < kGroupK / 4; quad += kQuads, codes += 4 * kPanelColumns) {
    U16 packed[C];
    for (int c = 0; c < C; ++c) {
      if (kIsAsking) __builtin_prefetch(codes + 64 * c + kPrefetchedGroups * group_bytes(W));
      packed[c] = load_words(codes + 64 * c);
    }
    for (int i = 0; i < kQuads; ++i) {
      typename Sum::Codes quads[C];
      for (int c = 0; c < C; ++c) {
        const U16 shifted = i == 0 ? packed[c] : shift_right<4>(packed[c]);
        quads[c] = Sum::codes(kIsByte ? packed[c] : shifted & set1_u(0x0f0f0f0f));
      }
      for (int r = 0; r < R; ++r) {
        const uint32_t* digits = words + r * Group::kRowWords;
        for (int d = 0; d < Group::kDigits; ++d, digits += Group::kDigitWords) {
          const auto factor = Sum::factor(digits, quad + i);
          for (int c = 0; c < C; ++c) {
            Sum& sum = sums[r][d][c];
            if (quad + i == 0) {
              sum.begin(d == 2 ? 0 : words[r * Group::kRowWords + Group::kStart + d], quads[c],
                        factor);
            } else {
              sum.add(quads[c], factor);
            }
          }
        }
      }
    }
  }
  for (int c = 0; c < C; ++c) {
    const GroupScales<W> scales(group, column + 16 * c);
    for (int r = 0; r < R; ++r) {
      const uint32_t* start = words + r * Group::kRowWords + Group::kStart;
      const U16 low = sums[r][0][c].total(start[0]);
      U16 high = sums[r][1][c].total(start[1]);
      if constexpr (!Group::kHasWideDigits) high = shift_left<8>(sums[r][2][c].total(0)) + high;
      scales.add(low, high, x + r * Group::kRowWords, totals + r * kPanelColumns + column + 16 * c);
    }
  }
}

// Register blocks: up to block_rows rows by block_vectors vectors of columns.
template <DType W>
constexpr int block_rows() {
  constexpr int kMaxSums = FixedGroup<W>::Sum::kMaxSums;
  return kMaxSums < 4 ? kMaxSums : 4;
}
template <DType W>
constexpr int block_vectors(int num_rows) {
  constexpr int kMaxSums = FixedGroup<W>::Sum::kMaxSums;
  return kMaxSums < 4 ? 1 : num_rows == 1 ? 4 : kMaxSums / 4;
}

// One group of a panel for at most block_rows rows.
template <DType W, bool kIsAsking>
inline void multiply_group_rows(int num_rows, const char* group, const float* x, float* totals) {
#define SPECENGINE_BLOCK(R)                                                          \
  case R:                                                                            \
    if constexpr (R <= block_rows<W>()) {                                            \
      constexpr int kVectors = block_vectors<W>(R);                                  \
      for (int column = 0; column < kPanelColumns; column += 16 * kVectors) {        \
        multiply_group<R, kVectors, W, kIsAsking>(group, column, forget(x), totals); \
      }                                                                              \
    }                                                                                \
    break;
  switch (num_rows) {
    SPECENGINE_BLOCK(1)
    SPECENGINE_BLOCK(2)
    SPECENGINE_BLOCK(3)
    SPECENGINE_BLOCK(4)
  }
#undef SPECENGINE_BLOCK
}

// One chunk of a panel for every row, in blocks of rows.
template <DType W>
inline void add_grouped_chunk(int num_rows, const char* chunk, const float* x, int num_k,
                              float* totals) {
  const int num_blocks = (num_rows + block_rows<W>() - 1) / block_rows<W>();
  for (int block = 0; block < num_blocks; ++block) {
    const int row = num_rows * block / num_blocks;
    const int count = num_rows * (block + 1) / num_blocks - row;
    const float* rows = x + row * FixedGroup<W>::kRowWords;
    float* sums = totals + row * kPanelColumns;
    const char* group = chunk;
    for (int k = 0; k < num_k;
         k += kGroupK, group += group_bytes(W), rows += FixedGroup<W>::kWords) {
      if (block == 0) {
        for (int64_t at = 0; at < group_header_bytes(W); at += 64) {
          __builtin_prefetch(group + at + kPrefetchedGroups * group_bytes(W));
        }
        multiply_group_rows<W, true>(count, group, rows, sums);
      } else {
        multiply_group_rows<W, false>(count, group, rows, sums);
      }
    }
  }
}
