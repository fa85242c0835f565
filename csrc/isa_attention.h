// Attention of one sequence's rows over one key/value head. Included inside an instruction set's
// namespace. A query vector visits KV tiles that start at absolute multiples of kAttentionTile;
// each tile gives a partial (maximum, normaliser, weighted values), merged in index order. Which
// other queries share the visit changes nothing; a tile that is masked for a query is left out,
// which is what merging (-inf, 0) would do.

template <DType T>
inline F16 load_kv(const void* data, int64_t at) {
  if constexpr (T == DType::kFloat32) return load(static_cast<const float*>(data) + at);
  if constexpr (T == DType::kBFloat16) return load_bf16(static_cast<const uint16_t*>(data) + at);
  return load_fp16(static_cast<const uint16_t*>(data) + at);
}

// One tile's keys or values as rows of `padded` floats: in place where the cache is already that,
// else converted into scratch.
struct TileRows {
  const float* row[kAttentionTile];
};

template <DType T>
inline void gather_tile(const AttentionArgs& args, const int32_t* table, int64_t kv_head,
                        bool is_value, int64_t begin, int count, int64_t padded, float* scratch,
                        TileRows& rows) {
  const int64_t head_elements = args.block_size * args.head_dim;
  const int64_t base = (is_value ? args.num_blocks : 0) * args.num_kv_heads;
  for (int j = 0; j < count; ++j) {
    const int64_t position = begin + j;
    const int64_t block = table[position / args.block_size];
    const int64_t at = (base + block * args.num_kv_heads + kv_head) * head_elements +
                       position % args.block_size * args.head_dim;
    if (T == DType::kFloat32 && padded == args.head_dim) {
      rows.row[j] = static_cast<const float*>(args.kv) + at;
      continue;
    }
    float* out = scratch + j * padded;
    const int64_t whole = args.head_dim / 16 * 16;
    for (int64_t d = 0; d < whole; d += 16) store(out + d, load_kv<T>(args.kv, at + d));
    for (int64_t d = whole; d < padded; ++d) {
      out[d] = d < args.head_dim ? load_float(args.kv, T, at + d) : 0.0f;
    }
    rows.row[j] = out;
  }
}

// Query vectors that share one visit of a tile.
constexpr int kMaxSharedQueries = 16;

// One query: its running (maximum, normaliser, weighted values), and its part of the tile at hand.
struct QueryState {
  float largest;
  float normaliser;
  int count;  // tokens of the tile that it sees
  float tile_largest;
  float tile_normaliser;
  alignas(64) float query[kMaxHeadDim];
  alignas(64) float output[kMaxHeadDim];
  alignas(64) float weights[kAttentionTile];
  alignas(64) float tile_output[kMaxHeadDim];
};

template <int kVectors>
inline F16 multiply_key(const float* query, const float* key, int64_t num_vectors) {
  const int64_t n = kVectors > 0 ? kVectors : num_vectors;
  F16 sum = load(query) * load(key);
  for (int64_t i = 1; i < n; ++i) sum = fma(load(query + 16 * i), load(key + 16 * i), sum);
  return sum;
}

// weights[j] = exp(s_j - max s), s_j = scale * (q · k_j), for the `count` tokens the query sees.
template <int kVectors>
inline void score_tile(QueryState& state, const TileRows& keys, int64_t num_vectors, float scale) {
  float* scores = state.weights;
  const int padded = (state.count + 15) / 16 * 16;
  F16 largest = set1(-__builtin_inff());
  for (int begin = 0; begin < padded; begin += 16) {
    const int in_group = state.count - begin < 16 ? state.count - begin : 16;
    F16 sums[16];
    if (in_group == 16) {
      for (int t = 0; t < 16; ++t) {
        sums[t] = multiply_key<kVectors>(state.query, keys.row[begin + t], num_vectors);
      }
    } else {
      for (int t = 0; t < 16; ++t) {
        sums[t] = t < in_group
                      ? multiply_key<kVectors>(state.query, keys.row[begin + t], num_vectors)
                      : set1(0.0f);
      }
    }
    store(scores + begin, reduce_add_each(sums) * set1(scale));
    for (int t = in_group; t < 16; ++t) scores[begin + t] = -__builtin_inff();
    largest = maximum(largest, load(scores + begin));
  }
  state.tile_largest = reduce_max(largest);
  F16 sum = set1(0.0f);
  for (int j = 0; j < padded; j += 16) {
    const F16 weight = exp(load(scores + j) - set1(state.tile_largest));
    store(scores + j, weight);
    sum = sum + weight;
  }
  state.tile_normaliser = reduce_add(sum);
}

// tile_output[d] = sum over j, in order, of weights[j] * v_j[d], for kQueries queries of which the
// first sees the least.
template <int kVectors, int kQueries>
inline void weigh_tile(QueryState* states, const TileRows& values) {
  F16 sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int i = 0; i < kVectors; ++i) sums[q][i] = set1(0.0f);
  }
  for (int j = 0; j < states[0].count; ++j) {
    F16 value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load(values.row[j] + 16 * i);
    for (int q = 0; q < kQueries; ++q) {
      const F16 weight = set1(states[q].weights[j]);
      for (int i = 0; i < kVectors; ++i) sums[q][i] = fma(weight, value[i], sums[q][i]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int j = states[0].count; j < states[q].count; ++j) {
      const F16 weight = set1(states[q].weights[j]);
      for (int i = 0; i < kVectors; ++i) {
        sums[q][i] = fma(weight, load(values.row[j] + 16 * i), sums[q][i]);
      }
    }
    for (int i = 0; i < kVectors; ++i) store(states[q].tile_output + 16 * i, sums[q][i]);
  }
}

inline void weigh_tile_any(QueryState& state, const TileRows& values, int64_t num_vectors) {
  for (int64_t i = 0; i < num_vectors; ++i) {
    F16 sum = set1(0.0f);
    for (int j = 0; j < state.count; ++j) {
      sum = fma(set1(state.weights[j]), load(values.row[j] + 16 * i), sum);
    }
    store(state.tile_output + 16 * i, sum);
  }
}

inline float exp_one(float x) {
  alignas(64) float lanes[16];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

inline void merge_tile(QueryState& state, int64_t num_vectors) {
  const float next = state.largest > state.tile_largest ? state.largest : state.tile_largest;
  const float keep = exp_one(state.largest - next);
  const float add = exp_one(state.tile_largest - next);
  state.normaliser = state.normaliser * keep + state.tile_normaliser * add;
  for (int64_t i = 0; i < num_vectors; ++i) {
    const F16 kept = load(state.output + 16 * i) * set1(keep);
    store(state.output + 16 * i, fma(load(state.tile_output + 16 * i), set1(add), kept));
  }
  state.largest = next;
}

// Visits the tile with queries that all see some of it, those that see less first.
template <int kVectors>
inline void visit_tile(QueryState* states, int num_queries, const TileRows& keys,
                       const TileRows& values, int64_t num_vectors, float scale) {
  for (int q = 0; q < num_queries; ++q) score_tile<kVectors>(states[q], keys, num_vectors, scale);
  if constexpr (kVectors > 0) {
    constexpr int kFitting = (kNumRegisters - kVectors - 1) / kVectors;
    constexpr int kBlock = kFitting >= 4 ? 4 : kFitting >= 2 ? 2 : 1;
    int q = 0;
    for (; q + kBlock <= num_queries; q += kBlock) weigh_tile<kVectors, kBlock>(states + q, values);
    for (; q < num_queries; ++q) weigh_tile<kVectors, 1>(states + q, values);
  } else {
    for (int q = 0; q < num_queries; ++q) weigh_tile_any(states[q], values, num_vectors);
  }
  for (int q = 0; q < num_queries; ++q) merge_tile(states[q], num_vectors);
}

inline void visit_tile_any(QueryState* states, int num_queries, const TileRows& keys,
                           const TileRows& values, int64_t num_vectors, float scale) {
  switch (num_vectors) {
    case 1:
      return visit_tile<1>(states, num_queries, keys, values, num_vectors, scale);
    case 2:
      return visit_tile<2>(states, num_queries, keys, values, num_vectors, scale);
    case 4:
      return visit_tile<4>(states, num_queries, keys, values, num_vectors, scale);
    case 5:
      return visit_tile<5>(states, num_queries, keys, values, num_vectors, scale);
    case 8:
      return visit_tile<8>(states, num_queries, keys, values, num_vectors, scale);
    default:
      return visit_tile<0>(states, num_queries, keys, values, num_vectors, scale);
  }
}

template <DType T>
inline void attend(const AttentionArgs& args, int64_t sequence, int64_t first_head, int num_heads,
                   int64_t row_begin, int64_t row_end) {
  const int64_t kv_head = first_head / (args.num_heads / args.num_kv_heads);
  const int64_t padded = (args.head_dim + 15) / 16 * 16;
  const int64_t num_vectors = padded / 16;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(args.head_dim));
  const int32_t* table = args.block_table + args.slots[sequence] * args.table_stride;
  // Row i of the batch sees positions below visible(i).
  const int64_t offset = int64_t{args.context_len[sequence]} - args.q_start[sequence + 1] + 1;

  alignas(64) float key_scratch[kAttentionTile * kMaxHeadDim];
  alignas(64) float value_scratch[kAttentionTile * kMaxHeadDim];
  QueryState states[kMaxSharedQueries];
  const int num_rows = static_cast<int>(row_end - row_begin);
  for (int q = 0; q < num_rows * num_heads; ++q) {
    const float* query =
        args.query +
        ((row_begin + q / num_heads) * args.num_heads + first_head + q % num_heads) * args.head_dim;
    QueryState& state = states[q];
    state.largest = -__builtin_inff();
    state.normaliser = 0.0f;
    for (int64_t d = 0; d < padded; ++d) {
      state.query[d] = d < args.head_dim ? query[d] : 0.0f;
      state.output[d] = 0.0f;
    }
  }
  const int64_t last_visible = row_end - 1 + offset;
  for (int64_t begin = 0; begin < last_visible; begin += kAttentionTile) {
    const int64_t left = last_visible - begin;
    const int count = left < kAttentionTile ? static_cast<int>(left) : kAttentionTile;
    TileRows keys, values;
    gather_tile<T>(args, table, kv_head, false, begin, count, padded, key_scratch, keys);
    gather_tile<T>(args, table, kv_head, true, begin, count, padded, value_scratch, values);
    int first = 0;
    for (int q = 0; q < num_rows * num_heads; ++q) {
      const int64_t seen = row_begin + q / num_heads + offset - begin;
      states[q].count = seen < count ? static_cast<int>(seen) : count;
      if (seen <= 0) first = q + 1;
    }
    visit_tile_any(states + first, num_rows * num_heads - first, keys, values, num_vectors, scale);
  }
  for (int q = 0; q < num_rows * num_heads; ++q) {
    float* out =
        args.out +
        ((row_begin + q / num_heads) * args.num_heads + first_head + q % num_heads) * args.head_dim;
    const float inverse = 1.0f / states[q].normaliser;
    for (int64_t d = 0; d < args.head_dim; ++d) out[d] = states[q].output[d] * inverse;
  }
}

template <DType T>
inline void attend_rows(const AttentionArgs& args, int64_t sequence, int64_t kv_head,
                        int64_t row_begin, int64_t row_end) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  for (int64_t head = 0; head < group; head += kMaxSharedQueries) {
    const int64_t left = group - head;
    const int num_heads = left < kMaxSharedQueries ? static_cast<int>(left) : kMaxSharedQueries;
    const int64_t step = kMaxSharedQueries / num_heads;
    for (int64_t row = row_begin; row < row_end; row += step) {
      attend<T>(args, sequence, kv_head * group + head, num_heads, row,
                row + step < row_end ? row + step : row_end);
    }
  }
}

inline void attention(const AttentionArgs& args, int64_t sequence, int64_t kv_head,
                      int64_t row_begin, int64_t row_end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return attend_rows<DType::kFloat32>(args, sequence, kv_head, row_begin, row_end);
    case DType::kBFloat16:
      return attend_rows<DType::kBFloat16>(args, sequence, kv_head, row_begin, row_end);
    case DType::kFloat16:
      return attend_rows<DType::kFloat16>(args, sequence, kv_head, row_begin, row_end);
    case DType::kInt8:  // weights only
      return;
  }
}
