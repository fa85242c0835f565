// Attention of one sequence's rows over one key/value head. Included inside an instruction set's
// namespace. A query vector visits KV tiles that start at absolute multiples of kAttentionTile;
// each tile gives a partial (maximum, normaliser, weighted values), merged in index order. A score
// is reduce_add of sixteen sums over every sixteenth d, in order, and a weighted value the sum over
// the tile's tokens, in order: how many queries share a register block changes nothing. A tile that
// is masked for a query is left out, which is what merging (-inf, 0) would do.

// Queries of a register block: each keeps two sums of a score, or vectors of a value.
constexpr int kMaxScoreQueries = kNumRegisters < 6 ? 1 : kNumRegisters < 16 ? 3 : 6;
constexpr int kMaxBlockQueries = 6;
// Groups of sixteen keys that a block of queries is scored with at once.
constexpr int kMaxScoreGroups = kNumRegisters < 30 ? 1 : 2;
// Values that every query takes before the next: they stay in the first cache.
constexpr int kValuesAtOnce = 32;
// Groups of sixteen keys between the one that is scored and the one that is asked for, in the first
// tile.
constexpr int kGroupsAhead = 2;

// Vectors of a value that a register block of that many queries takes at once.
constexpr int block_vectors(int num_queries) {
  const int fitting = (kNumRegisters - 2) / num_queries;
  return fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
}

template <DType T>
inline F16 load_kv(const char* row, int64_t at) {
  if constexpr (T == DType::kFloat32) return load(reinterpret_cast<const float*>(row) + at);
  if constexpr (T == DType::kBFloat16)
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + at);
  return load_fp16(reinterpret_cast<const uint16_t*>(row) + at);
}

// Where a tile's key rows are in the cache.
struct TileRows {
  int count;
  const char* row[kAttentionTile];
};

// Asks for `count` rows, or as many as there are, from `first` on, `offset` bytes further on:
// values while keys are scored, the next tile's keys while values are weighed.
inline void ask_for(const TileRows& tile, int first, int count, int64_t offset, int64_t row_bytes) {
  const int end = first + count < tile.count ? first + count : tile.count;
  for (int j = first; j < end; ++j) {
    for (int64_t at = 0; at < row_bytes; at += 64) {
      __builtin_prefetch(tile.row[j] + offset + at, 0, 2);
    }
  }
}

inline void locate_tile(const AttentionArgs& args, const int32_t* table, int64_t kv_head,
                        int64_t row_bytes, int64_t begin, int64_t end, TileRows& rows) {
  const int64_t left = end - begin;
  rows.count = left < kAttentionTile ? static_cast<int>(left) : kAttentionTile;
  int64_t index = begin / args.block_size, within = begin % args.block_size;
  for (int j = 0; j < rows.count; ++index, within = 0) {
    const int64_t at =
        (int64_t{table[index]} * args.num_kv_heads + kv_head) * args.block_size + within;
    const char* row = static_cast<const char*>(args.kv) + at * row_bytes;
    const int64_t in_block = args.block_size - within;
    const int stop = in_block < rows.count - j ? j + static_cast<int>(in_block) : rows.count;
    for (; j < stop; ++j, row += row_bytes) rows.row[j] = row;
  }
}

// A row as `padded` floats.
template <DType T>
inline void convert_row(const char* row, int64_t head_dim, int64_t padded, float* out) {
  const int64_t whole = head_dim / 16 * 16;
  for (int64_t d = 0; d < whole; d += 16) store(out + d, load_kv<T>(row, d));
  for (int64_t d = whole; d < padded; ++d) {
    out[d] = d < head_dim ? load_float(row, T, d) : 0.0f;
  }
}

typedef float Lanes4 __attribute__((vector_size(16)));
typedef float Lanes8 __attribute__((vector_size(32)));

// The halves of two rows beside each other.
inline void load_halves(const float* a, const float* b, Lanes8& out) {
  Lanes4 low, high;
  __builtin_memcpy(&low, a, 16);
  __builtin_memcpy(&high, b, 16);
  out = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}

inline void store_lanes(float* out, const Lanes8& lanes) { __builtin_memcpy(out, &lanes, 32); }

// out[16 d + t] = rows[t][d] for eight rows and d < size, a multiple of 4.
inline void transpose_rows(const float* const* rows, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d += 4, out += 64) {
    Lanes8 r0, r1, r2, r3;
    load_halves(rows[0] + d, rows[4] + d, r0);
    load_halves(rows[1] + d, rows[5] + d, r1);
    load_halves(rows[2] + d, rows[6] + d, r2);
    load_halves(rows[3] + d, rows[7] + d, r3);
    const Lanes8 low01 = __builtin_shufflevector(r0, r1, 0, 8, 1, 9, 4, 12, 5, 13);
    const Lanes8 low23 = __builtin_shufflevector(r2, r3, 0, 8, 1, 9, 4, 12, 5, 13);
    const Lanes8 high01 = __builtin_shufflevector(r0, r1, 2, 10, 3, 11, 6, 14, 7, 15);
    const Lanes8 high23 = __builtin_shufflevector(r2, r3, 2, 10, 3, 11, 6, 14, 7, 15);
    store_lanes(out, __builtin_shufflevector(low01, low23, 0, 1, 8, 9, 4, 5, 12, 13));
    store_lanes(out + 16, __builtin_shufflevector(low01, low23, 2, 3, 10, 11, 6, 7, 14, 15));
    store_lanes(out + 32, __builtin_shufflevector(high01, high23, 0, 1, 8, 9, 4, 5, 12, 13));
    store_lanes(out + 48, __builtin_shufflevector(high01, high23, 2, 3, 10, 11, 6, 7, 14, 15));
  }
}

// The queries of one visit, in order of what they see, and their part of the tile at hand.
struct Queries {
  int count;
  int64_t padded;
  float* query;                 // [count, padded], scaled
  float* output;                // [count, padded]
  float* weights;               // [count, kAttentionTile]
  float* sums;                  // [count, padded], weighted values of the tile
  int seen[kMaxSharedQueries];  // tokens of the tile
  float tile_largest[kMaxSharedQueries];
  float tile_normaliser[kMaxSharedQueries];
  float largest[kMaxSharedQueries];
  float normaliser[kMaxSharedQueries];
  float keep[kMaxSharedQueries];  // factors of this merge
  float add[kMaxSharedQueries];
};

// Sixteen rows from `first` on as `padded` floats each; the last one again where there are fewer.
template <DType T>
inline void locate_group(const TileRows& tile, int first, int64_t head_dim, int64_t padded,
                         float* converted, const float* (&rows)[16]) {
  for (int t = 0; t < 16; ++t) {
    const char* row = tile.row[first + t < tile.count ? first + t : tile.count - 1];
    if (T == DType::kFloat32 && padded == head_dim) {
      rows[t] = reinterpret_cast<const float*>(row);
    } else {
      convert_row<T>(row, head_dim, padded, converted + t * padded);
      rows[t] = converted + t * padded;
    }
  }
}

// scores[t] = q · k_t for one query and sixteen keys.
inline void score_alone(const float* query, const float* const (&rows)[16], int64_t padded,
                        float* scores) {
  F16 sums[16];
#pragma GCC unroll 16
  for (int t = 0; t < 16; ++t) sums[t] = set1(0.0f);
  for (int64_t d = 0; d < padded; d += 16) {
    const F16 q = load(query + d);
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) sums[t] = fma(q, load(rows[t] + d), sums[t]);
  }
  store(scores, reduce_add_each(sums));
}

// The same for kQueries queries and kGroups groups of keys, each keys[16 d + t] = k_t[d] and the
// next one 16 padded further on; the additions are those of reduce_add. A query's number is loaded
// once for all groups: loading, not multiplying, is what takes time here.
template <int kQueries, int kGroups>
inline void score_block(const float* query, const float* keys, int64_t padded, float* scores) {
  F16 halves[8][kQueries][kGroups];
  for (int i = 0; i < 8; ++i) {
    F16 low[kQueries][kGroups], high[kQueries][kGroups];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      for (int g = 0; g < kGroups; ++g) low[q][g] = high[q][g] = set1(0.0f);
    }
    for (int64_t d = i; d < padded; d += 16) {
      F16 low_key[kGroups], high_key[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        low_key[g] = load(keys + 16 * (g * padded + d));
        high_key[g] = load(keys + 16 * (g * padded + d + 8));
      }
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        const F16 low_query = set1(query[q * padded + d]);
        for (int g = 0; g < kGroups; ++g) low[q][g] = fma(low_query, low_key[g], low[q][g]);
        const F16 high_query = set1(query[q * padded + d + 8]);
        for (int g = 0; g < kGroups; ++g) high[q][g] = fma(high_query, high_key[g], high[q][g]);
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      for (int g = 0; g < kGroups; ++g) halves[i][q][g] = low[q][g] + high[q][g];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int g = 0; g < kGroups; ++g) {
      F16 quarters[4];
      for (int i = 0; i < 4; ++i) quarters[i] = halves[i][q][g] + halves[i + 4][q][g];
      const F16 even = quarters[0] + quarters[2], odd = quarters[1] + quarters[3];
      store(scores + q * kAttentionTile + 16 * g, even + odd);
    }
  }
}

// Scores become weights exp(s - max s), 0 for tokens that the query does not see.
inline void weigh_scores(Queries& queries, int q) {
  float* scores = queries.weights + q * kAttentionTile;
  const int seen = queries.seen[q];
  const int whole = seen / 16 * 16;
  if (whole < seen) {
    const Mask is_seen = from_int(iota()) < set1(static_cast<float>(seen - whole));
    store(scores + whole, select(is_seen, load(scores + whole), set1(-__builtin_inff())));
  }
  F16 maxima = load(scores);
  for (int j = 16; j < seen; j += 16) maxima = maximum(maxima, load(scores + j));
  const float tile_largest = reduce_max(maxima);
  F16 sum = set1(0.0f);
  for (int j = 0; j < seen; j += 16) {
    const F16 weight = exp(load(scores + j) - set1(tile_largest));
    store(scores + j, weight);
    sum = sum + weight;
  }
  queries.tile_largest[q] = tile_largest;
  queries.tile_normaliser[q] = reduce_add(sum);
}

// What a query found in a tile is merged into what it found in those before: first the scores, and
// with them the factors of the values.
inline void merge_scores(Queries& queries, int q, float tile_largest, float tile_normaliser) {
  const float before = queries.largest[q];
  const float next = before > tile_largest ? before : tile_largest;
  alignas(64) float factors[16] = {before - next, tile_largest - next};
  store(factors, exp(load(factors)));
  queries.largest[q] = next;
  queries.keep[q] = factors[0];
  queries.add[q] = factors[1];
  queries.normaliser[q] = queries.normaliser[q] * factors[0] + tile_normaliser * factors[1];
}

inline void merge_values(Queries& queries, int q, const float* sums) {
  float* output = queries.output + q * queries.padded;
  for (int64_t d = 0; d < queries.padded; d += 16) {
    const F16 kept = load(output + d) * set1(queries.keep[q]);
    store(output + d, fma(load(sums + d), set1(queries.add[q]), kept));
  }
}

// sums[d] += weights[j] * v_j[d] for tokens `begin` to before `end`, in order, for kQueries queries
// from `first` on and kVectors vectors from element `at` on.
template <DType T, int kQueries, int kVectors>
inline void weigh_block(const Queries& queries, int first, const TileRows& tile,
                        int64_t value_offset, int64_t at, int64_t begin, int64_t end) {
  const int64_t stride = queries.padded;
  const float* weights = queries.weights + first * kAttentionTile;
  float* memory = queries.sums + first * stride + at;
  F16 sums[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kVectors; ++i) sums[q][i] = load(memory + q * stride + 16 * i);
  }
  for (int64_t j = begin; j < end; ++j) {
    const char* row = tile.row[j] + value_offset;
    F16 value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load_kv<T>(row, at + 16 * i);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const F16 weight = set1(weights[q * kAttentionTile + j]);
      for (int i = 0; i < kVectors; ++i) sums[q][i] = fma(weight, value[i], sums[q][i]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kVectors; ++i) store(memory + q * stride + 16 * i, sums[q][i]);
  }
}

template <DType T, int kQueries, int kVectors = block_vectors(kQueries)>
inline void weigh_vectors(const Queries& queries, int first, const TileRows& tile,
                          int64_t value_offset, int64_t at, int64_t begin, int64_t end) {
  for (; at + 16 * kVectors <= queries.padded; at += 16 * kVectors) {
    weigh_block<T, kQueries, kVectors>(queries, first, tile, value_offset, at, begin, end);
  }
  if constexpr (kVectors > 1) {
    weigh_vectors<T, kQueries, kVectors / 2>(queries, first, tile, value_offset, at, begin, end);
  }
}

// What the first of the queries sees they all see; the others take the rest each on their own.
template <DType T, int kQueries>
inline void weigh_values(const Queries& queries, int first, const TileRows& tile,
                         int64_t value_offset, int begin, int end) {
  int shared = queries.seen[first] < end ? queries.seen[first] : end;
  if (shared < begin) shared = begin;
  weigh_vectors<T, kQueries>(queries, first, tile, value_offset, 0, begin, shared);
  for (int q = first + 1; q < first + kQueries; ++q) {
    const int seen = queries.seen[q] < end ? queries.seen[q] : end;
    if (shared < seen) weigh_vectors<T, 1>(queries, q, tile, value_offset, 0, shared, seen);
  }
}

// Calls visit(first, integral constant) for register blocks of up to kMax of the queries from
// `begin` on.
template <int kQueries>
struct BlockOf {
  static constexpr int value = kQueries;
};
template <int kMax, class Visit>
inline void for_each_block(int begin, int end, const Visit& visit) {
  for (; begin + kMax <= end; begin += kMax) visit(begin, BlockOf<kMax>{});
  if constexpr (kMax > 1) for_each_block<kMax - 1>(begin, end, visit);
}

// A visit's products with keys and values, in vectors.
template <DType T>
class VectorProducts {
 public:
  static constexpr DType kType = T;

  // scratch: what attention_scratch leaves beside the queries
  VectorProducts(Queries& queries, int64_t head_dim, int64_t value_offset, float* scratch)
      : queries_(queries),
        head_dim_(head_dim),
        padded_(queries.padded),
        row_bytes_(head_dim * element_size(T)),
        value_offset_(value_offset),
        keys_(scratch),
        converted_(keys_ + 32 * padded_),
        values_(converted_ + 16 * padded_) {}

  // Scores sixteen of the tile's tokens, from `begin` on, for the queries from `first` on.
  void score(const TileRows& tile, int begin, int first) {
    const float* rows[16];
    locate_group<T>(tile, begin, head_dim_, padded_, converted_, rows);
    if (queries_.count - first == 1) {
      score_alone(queries_.query + first * padded_, rows, padded_,
                  queries_.weights + first * kAttentionTile + begin);
      return;
    }
    const int group = begin / 16 % kMaxScoreGroups;
    transpose_rows(rows, padded_, keys_ + 16 * padded_ * group);
    transpose_rows(rows + 8, padded_, keys_ + 16 * padded_ * group + 8);
    const bool is_last = begin + 16 >= tile.count;
    if (group + 1 < kMaxScoreGroups && !is_last) return;
    float* scores = queries_.weights + (begin - 16 * group);
    for_each_block<kMaxScoreQueries>(first, queries_.count, [&](int q, auto block) {
      const float* query = queries_.query + q * padded_;
      if (group == 0) {
        score_block<block.value, 1>(query, keys_, padded_, scores + q * kAttentionTile);
      } else {
        score_block<block.value, kMaxScoreGroups>(query, keys_, padded_,
                                                  scores + q * kAttentionTile);
      }
    });
  }

  // Weighs the tile's values for the queries from `first` on; asks for the `next` tile's keys.
  void weigh(const TileRows& tile, const TileRows& next, int first) {
    if (padded_ == head_dim_) return weigh_rows<T>(tile, value_offset_, next, first);
    TileRows converted{tile.count, {}};
    for (int j = 0; j < tile.count; ++j) {
      float* value = values_ + j * padded_;
      convert_row<T>(tile.row[j] + value_offset_, head_dim_, padded_, value);
      converted.row[j] = reinterpret_cast<const char*>(value);
    }
    weigh_rows<DType::kFloat32>(converted, 0, next, first);
  }

 private:
  template <DType V>
  void weigh_rows(const TileRows& tile, int64_t value_offset, const TileRows& next, int first) {
    for (int64_t d = first * padded_; d < queries_.count * padded_; d += 16) {
      store(queries_.sums + d, set1(0.0f));
    }
    for (int begin = 0; begin < tile.count; begin += kValuesAtOnce) {
      const int end = begin + kValuesAtOnce < tile.count ? begin + kValuesAtOnce : tile.count;
      ask_for(next, begin, kValuesAtOnce, 0, row_bytes_);
      for_each_block<kMaxBlockQueries>(first, queries_.count, [&](int q, auto block) {
        weigh_values<V, block.value>(queries_, q, tile, value_offset, begin, end);
      });
    }
  }

  Queries& queries_;
  int64_t head_dim_, padded_, row_bytes_, value_offset_;
  float* keys_;       // [2, padded, 16]
  float* converted_;  // [16, padded]
  float* values_;     // [kAttentionTile, padded]
};

// Sets how many tokens of the tile at `begin` each query sees; returns the first that sees any.
inline int see_tile(Queries& queries, int num_heads, int64_t first_seen, int64_t begin,
                    int64_t size) {
  int first = 0;
  for (int q = 0; q < queries.count; ++q) {
    const int64_t seen = first_seen + q / num_heads - begin;
    queries.seen[q] = static_cast<int>(seen < size ? seen : size);
    if (seen <= 0) first = q + 1;
  }
  return first;
}

template <class Products>
inline void attend(const AttentionArgs& args, int64_t sequence, int64_t first_head, int num_heads,
                   int64_t row_begin, int64_t row_end, const AttentionPart& part, float* scratch) {
  const int64_t kv_head = first_head / (args.num_heads / args.num_kv_heads);
  const int64_t head_dim = args.head_dim;
  const int64_t padded = (head_dim + 15) / 16 * 16;
  const int64_t row_bytes = head_dim * element_size(Products::kType);
  const int64_t value_offset = args.num_blocks * args.num_kv_heads * args.block_size * row_bytes;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  const int32_t* table = args.block_table + args.slots[sequence] * args.table_stride;
  // Row i of the batch sees positions below i + offset.
  const int64_t offset = int64_t{args.context_len[sequence]} - args.q_start[sequence + 1] + 1;

  Queries queries;
  queries.count = static_cast<int>(row_end - row_begin) * num_heads;
  queries.padded = padded;
  queries.query = scratch;
  queries.output = queries.query + kMaxSharedQueries * padded;
  queries.weights = queries.output + kMaxSharedQueries * padded;
  queries.sums = queries.weights + kMaxSharedQueries * kAttentionTile;
  // Element 0 of query q in args.query and args.out.
  const auto position = [&](int q) {
    return ((row_begin + q / num_heads) * args.num_heads + first_head + q % num_heads) * head_dim;
  };
  for (int q = 0; q < queries.count; ++q) {
    const float* query = args.query + position(q);
    queries.largest[q] = -__builtin_inff();
    queries.normaliser[q] = 0.0f;
    for (int64_t d = 0; d < padded; ++d) {
      queries.query[q * padded + d] = d < head_dim ? query[d] * scale : 0.0f;
      queries.output[q * padded + d] = 0.0f;
    }
  }
  Products products(queries, head_dim, value_offset, queries.sums + kMaxSharedQueries * padded);
  const int64_t end = row_end - 1 + offset;
  // Of one visit, what query q found in tile t.
  const int64_t part_words = attention_part_words(head_dim);
  const auto found = [&](int64_t t, int q) {
    return part.found + (t * queries.count + q) * part_words;
  };
  const bool is_part = part.found != nullptr && part.begin < part.end;
  const int64_t last_tile = (end + kAttentionTile - 1) / kAttentionTile;
  const int64_t first_tile = is_part ? part.begin : part.found == nullptr ? 0 : last_tile;
  const int64_t end_tile = is_part && part.end < last_tile ? part.end : last_tile;
  if (part.found != nullptr && !is_part) {
    for (int64_t t = 0; t < last_tile; ++t) {
      const int first =
          see_tile(queries, num_heads, row_begin + offset, t * kAttentionTile, kAttentionTile);
      for (int q = first; q < queries.count; ++q) {
        merge_scores(queries, q, found(t, q)[0], found(t, q)[1]);
        merge_values(queries, q, found(t, q) + 16);
      }
    }
  }
  TileRows tiles[2];
  if (first_tile < end_tile) {
    locate_tile(args, table, kv_head, row_bytes, first_tile * kAttentionTile, end,
                tiles[first_tile % 2]);
  }
  for (int64_t t = first_tile; t < end_tile; ++t) {
    const int64_t begin = t * kAttentionTile;
    TileRows& tile = tiles[t % 2];
    TileRows& next = tiles[(t + 1) % 2];
    next.count = 0;
    if (t + 1 < end_tile) {
      locate_tile(args, table, kv_head, row_bytes, begin + kAttentionTile, end, next);
    }
    const int first = see_tile(queries, num_heads, row_begin + offset, begin, tile.count);
    for (int j = 0; j < tile.count; j += 16) {
      if (t == first_tile) ask_for(tile, j + 16 * kGroupsAhead, 16, 0, row_bytes);
      ask_for(tile, j, 16, value_offset, row_bytes);
      products.score(tile, j, first);
    }
    for (int q = first; q < queries.count; ++q) {
      weigh_scores(queries, q);
      if (!is_part) merge_scores(queries, q, queries.tile_largest[q], queries.tile_normaliser[q]);
    }
    products.weigh(tile, next, first);
    for (int q = first; q < queries.count; ++q) {
      const float* sums = queries.sums + q * padded;
      if (is_part) {
        found(t, q)[0] = queries.tile_largest[q];
        found(t, q)[1] = queries.tile_normaliser[q];
        __builtin_memcpy(found(t, q) + 16, sums, sizeof(float) * padded);
      } else {
        merge_values(queries, q, sums);
      }
    }
  }
  if (is_part) return;
  for (int q = 0; q < queries.count; ++q) {
    float* out = args.out + position(q);
    const float inverse = 1.0f / queries.normaliser[q];
    for (int64_t d = 0; d < head_dim; ++d) out[d] = queries.output[q * padded + d] * inverse;
  }
}

template <class Products>
inline void attend_rows(const AttentionArgs& args, int64_t sequence, int64_t kv_head,
                        int64_t row_begin, int64_t row_end, const AttentionPart& part,
                        float* scratch) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  for (int64_t head = 0; head < group; head += kMaxSharedQueries) {
    const int64_t left = group - head;
    const int num_heads = left < kMaxSharedQueries ? static_cast<int>(left) : kMaxSharedQueries;
    const int64_t step = kMaxSharedQueries / num_heads;
    for (int64_t row = row_begin; row < row_end; row += step) {
      attend<Products>(args, sequence, kv_head * group + head, num_heads, row,
                       row + step < row_end ? row + step : row_end, part, scratch);
    }
  }
}

template <class Bf16Products>
inline void attention_of(const AttentionArgs& args, int64_t sequence, int64_t kv_head,
                         int64_t row_begin, int64_t row_end, const AttentionPart& part,
                         float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return attend_rows<VectorProducts<DType::kFloat32>>(args, sequence, kv_head, row_begin,
                                                          row_end, part, scratch);
    case DType::kBFloat16:
      return attend_rows<Bf16Products>(args, sequence, kv_head, row_begin, row_end, part, scratch);
    case DType::kFloat16:
      return attend_rows<VectorProducts<DType::kFloat16>>(args, sequence, kv_head, row_begin,
                                                          row_end, part, scratch);
    default:  // for weights only
      return;
  }
}

constexpr auto attention = attention_of<VectorProducts<DType::kBFloat16>>;
