// Attention over bf16 keys and values through tiles, for every number of queries. Included at the
// end of tiles.h.
//
// Queries, scaled, and weights are rounded to bf16. A score is the sum of tile products of 32
// elements of query and key in order, a weighted value that of tile products of 32 of the tile's
// tokens; see tiles.h for the order in one. Tokens that a query does not see have the weight 0 and
// add 0. Maxima, normalisers and the merging of tiles are as everywhere.

alignas(64) inline constexpr uint16_t kZeroValue[kMaxHeadDim] = {};

class TileProducts {
 public:
  static constexpr DType kType = DType::kBFloat16;

  TileProducts(Queries& queries, int64_t head_dim, int64_t value_offset, float* scratch)
      : queries_(queries),
        head_dim_(head_dim),
        padded_(queries.padded),
        row_bytes_(head_dim * element_size(kType)),
        value_offset_(value_offset),
        num_steps_(static_cast<int>((head_dim + kStepK - 1) / kStepK)),
        num_tiles_((queries.count + 15) / 16),
        height_((queries.count + num_tiles_ - 1) / num_tiles_),
        pairs_(reinterpret_cast<uint32_t*>(scratch)),
        copied_(reinterpret_cast<char*>(scratch + 32 * padded_)),
        values_(reinterpret_cast<uint32_t*>(scratch + 48 * padded_)),
        in_use_(shapes()) {
    pack_queries();
    const int num_spare = num_tiles_ * height_ - queries.count;
    __builtin_memset(queries.weights + queries.count * kAttentionTile, 0,
                     sizeof(float) * num_spare * kAttentionTile);
  }

  // See VectorProducts.
  void score(const TileRows& tile, int begin, int /*first*/) {
    int64_t stride = row_bytes_;
    const char* keys = tile.row[begin];
    if (!are_tile_rows(tile, begin)) {
      keys = copy_keys(tile, begin);
      stride = num_steps_ * 2 * kStepK;
    }
    Tiles::zero<0>();
    Tiles::zero<1>();
    for (int step = 0; step < num_steps_; ++step) {
      Tiles::load<2>(keys + step * 2 * kStepK, stride);
      Tiles::load<3>(pairs(0, step), 64);
      Tiles::multiply_bf16<0, 2, 3>();
      if (num_tiles_ == 1) continue;
      Tiles::load<3>(pairs(1, step), 64);
      Tiles::multiply_bf16<1, 2, 3>();
    }
    if (height_ == 1) return Tiles::store<0>(queries_.weights + begin, 4);
    store_scores<0>(begin);
    if (num_tiles_ == 2) store_scores<1>(begin);
  }

  void weigh(const TileRows& tile, const TileRows& next, int first) {
    for (int begin = 0; begin < next.count; begin += 16) ask_for(next, begin, 16, 0, row_bytes_);
    for (int q = 0; q < queries_.count; ++q) {
      float* weights = queries_.weights + q * kAttentionTile;
      pack_bf16<kAttentionTile>(weights, seen(q), reinterpret_cast<uint32_t*>(weights));
    }
    if (pack_values(tile, tile.count, seen(first))) return add_values(tile.count);
    // What no query before it sees is no number, and would be none with the weight 0.
    alignas(64) float sums[kMaxSharedQueries * kMaxHeadDim];
    for (int q = first; q < queries_.count; ++q) {
      pack_values(tile, seen(q), seen(q));
      add_values(tile.count);
      __builtin_memcpy(sums + q * padded_, queries_.sums + q * padded_, sizeof(float) * padded_);
    }
    __builtin_memcpy(queries_.sums, sums, sizeof(float) * queries_.count * padded_);
  }

 private:
  static constexpr int kStepK = 32;
  static_assert(kMaxSharedQueries <= 32, "two tiles of queries");

  // Tiles 0 and 1 hold scores, [keys, queries], 2 keys, 3 queries; 4 and 5 weighted values,
  // [queries, elements], 6 weights and 7 values.
  TileConfig shapes() const {
    TileConfig config;
    for (const int tile : {0, 1, 3}) config.set_shape(tile, 16, 4 * height_);
    for (const int tile : {4, 5, 6}) config.set_shape(tile, height_, 64);
    for (const int tile : {2, 7}) config.set_shape(tile, 16, 64);
    return config;
  }

  int seen(int q) const { return queries_.seen[q] < 0 ? 0 : queries_.seen[q]; }

  // Of a tile of queries, a step's elements in pairs: [16, 16 queries].
  uint32_t* pairs(int tile, int step) const { return pairs_ + (tile * num_steps_ + step) * 256; }

  void pack_queries() {
    __builtin_memset(pairs_, 0, sizeof(uint32_t) * num_tiles_ * num_steps_ * 256);
    for (int q = 0; q < queries_.count; ++q) {
      const float* query = queries_.query + q * padded_;
      for (int64_t begin = 0; begin < padded_; begin += kChunkK) {
        const int count = static_cast<int>(padded_ - begin < kChunkK ? padded_ - begin : kChunkK);
        alignas(64) uint32_t packed[kChunkK / 2];
        pack_bf16<kChunkK>(query + begin, count, packed);
        uint32_t* out = pairs(q / height_, static_cast<int>(begin / kStepK)) + q % height_;
        for (int i = 0; i < count / 2; ++i) out[16 * i] = packed[i];
      }
    }
  }

  // Whether sixteen keys can be read where they are.
  bool are_tile_rows(const TileRows& tile, int begin) const {
    if (begin + 16 > tile.count || head_dim_ % kStepK != 0) return false;
    for (int i = 1; i < 16; ++i) {
      if (tile.row[begin + i] != tile.row[begin] + i * row_bytes_) return false;
    }
    return true;
  }

  const char* copy_keys(const TileRows& tile, int begin) const {
    const int64_t stride = num_steps_ * 2 * kStepK;
    __builtin_memset(copied_, 0, 16 * stride);
    for (int i = 0; i < 16 && begin + i < tile.count; ++i) {
      __builtin_memcpy(copied_ + i * stride, tile.row[begin + i], row_bytes_);
    }
    return copied_;
  }

  template <int kTile>
  void store_scores(int begin) {
    alignas(64) float by_query[16 * 16];
    Tiles::store<kTile>(by_key_, 64);
    const float* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = by_key_[i];
    const int64_t size = (height_ + 3) / 4 * 4;
    transpose_rows(rows, size, by_query);
    transpose_rows(rows + 8, size, by_query + 8);
    for (int i = 0; i < height_ && kTile * height_ + i < queries_.count; ++i) {
      store(queries_.weights + (kTile * height_ + i) * kAttentionTile + begin,
            load(by_query + 16 * i));
    }
  }

  // The tile's first `count` values in pairs of tokens, [kAttentionTile / 2, padded, 2], zeros
  // after them. Whether those from `first_checked` on are finite.
  bool pack_values(const TileRows& tile, int count, int first_checked) const {
    alignas(64) uint16_t copied[2][kMaxHeadDim];
    if (padded_ != head_dim_) __builtin_memset(copied, 0, sizeof(copied));
    const int end = (tile.count + kStepK - 1) / kStepK * kStepK;
    F16 poison = set1(0.0f);
    for (int begin = 0; begin < end; begin += 2) {
      const uint16_t* rows[2];
      for (int i = 0; i < 2; ++i) {
        const char* row = begin + i < count ? tile.row[begin + i] + value_offset_
                                            : reinterpret_cast<const char*>(kZeroValue);
        rows[i] = reinterpret_cast<const uint16_t*>(row);
        if (padded_ == head_dim_) continue;
        __builtin_memcpy(copied[i], row, row_bytes_);
        rows[i] = copied[i];
      }
      uint32_t* out = values_ + begin / 2 * padded_;
      for (int64_t d = 0; d < padded_; d += 16) {
        const F16 even = load_bf16(rows[0] + d), odd = load_bf16(rows[1] + d);
        store(out + d, shift_right<16>(as_bits(even)) | as_bits(odd));
        if (begin + 1 < first_checked) continue;
        if (begin >= first_checked) poison = fma(even, set1(0.0f), poison);
        poison = fma(odd, set1(0.0f), poison);
      }
    }
    return reduce_add(poison) == 0.0f;
  }

  // queries.sums = weights times the packed values, of the first `count` tokens.
  void add_values(int count) const {
    const auto* weights = reinterpret_cast<const char*>(queries_.weights);
    constexpr int64_t kWeightsStride = sizeof(float) * kAttentionTile;
    const int64_t stride = 4 * padded_;
    for (int64_t d = 0; d < padded_; d += 16) {
      Tiles::zero<4>();
      Tiles::zero<5>();
      for (int begin = 0; begin < count; begin += kStepK) {
        Tiles::load<7>(values_ + begin / 2 * padded_ + d, stride);
        Tiles::load<6>(weights + 2 * begin, kWeightsStride);
        Tiles::multiply_bf16<4, 6, 7>();
        if (num_tiles_ == 1) continue;
        Tiles::load<6>(weights + height_ * kWeightsStride + 2 * begin, kWeightsStride);
        Tiles::multiply_bf16<5, 6, 7>();
      }
      Tiles::store<4>(queries_.sums + d, stride);
      if (num_tiles_ == 2) Tiles::store<5>(queries_.sums + height_ * padded_ + d, stride);
    }
  }

  Queries& queries_;
  const int64_t head_dim_, padded_, row_bytes_, value_offset_;
  const int num_steps_, num_tiles_, height_;
  uint32_t* pairs_;   // [2, steps, 16, 16]
  char* copied_;      // [16, steps * 64]
  uint32_t* values_;  // [kAttentionTile / 2, padded]
  // Scores as a tile leaves them; columns without a query stay 0.
  alignas(64) float by_key_[16][16] = {};
  const TilesInUse in_use_;
};
