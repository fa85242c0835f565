// A model of the processor's tiles, bit for bit as Intel describes them (the manual's TDPBF16PS and
// TDPBSUD), in numbers that every processor has. What the processor refuses traps here too.

typedef float ModelFloats __attribute__((vector_size(64)));
typedef int32_t ModelInts __attribute__((vector_size(64)));
typedef uint32_t ModelWords __attribute__((vector_size(64)));
typedef double ModelDoubles __attribute__((vector_size(128)));
typedef int64_t ModelLongs __attribute__((vector_size(128)));

inline ModelDoubles widen_model(ModelFloats x) { return __builtin_convertvector(x, ModelDoubles); }
// What fp32 would round to less than its normal numbers becomes a zero of the same sign.
inline ModelDoubles flush_model(ModelDoubles x) {
  const ModelDoubles size = x < 0.0 ? -x : x;
  const ModelLongs is_denormal = size < 0x1.ffffffp-127;
  return is_denormal ? x * 0.0 : x;
}
inline ModelFloats round_flushed(ModelDoubles x) {
  return __builtin_convertvector(flush_model(x), ModelFloats);
}
// From the high halves of words.
inline ModelDoubles from_bf16(ModelWords bits) {
  return flush_model(widen_model((ModelFloats)bits));
}

struct TileState {
  bool is_configured = false;
  TileConfig config;
  alignas(64) uint8_t tiles[8][16][64];
};

struct Tiles {
  static void configure(const TileConfig& config) {
    state.config = config;
    __builtin_memset(state.tiles, 0, sizeof(state.tiles));
    state.is_configured = true;
  }
  static void release() { state.is_configured = false; }

  template <int kTile>
  static void zero() {
    require(state.is_configured);
    __builtin_memset(state.tiles[kTile], 0, sizeof(state.tiles[kTile]));
  }
  template <int kTile>
  static void load(const void* base, int64_t stride) {
    zero<kTile>();
    for (int row = 0; row < state.config.rows[kTile]; ++row) {
      __builtin_memcpy(state.tiles[kTile][row], static_cast<const char*>(base) + row * stride,
                       state.config.row_bytes[kTile]);
    }
  }
  template <int kTile>
  static void store(void* base, int64_t stride) {
    require(state.is_configured);
    for (int row = 0; row < state.config.rows[kTile]; ++row) {
      __builtin_memcpy(static_cast<char*>(base) + row * stride, state.tiles[kTile][row],
                       state.config.row_bytes[kTile]);
    }
  }

  // A product of two bf16 has 16 bits, so that a sum in double is rounded to fp32 as a fused
  // multiply-add rounds it.
  template <int kSum, int kRows, int kColumns>
  static void multiply_bf16() {
    require_shapes<kSum, kRows, kColumns>();
    const int num_pairs = state.config.rows[kColumns];
    ModelDoubles columns[16][2];
    for (int k = 0; k < num_pairs; ++k) {
      const auto pairs = row<ModelWords, kColumns>(k);
      columns[k][0] = from_bf16(pairs << 16);
      columns[k][1] = from_bf16(pairs & 0xffff0000);
    }
    for (int m = 0; m < state.config.rows[kSum]; ++m) {
      const auto pairs = row<ModelWords, kRows>(m);
      const ModelDoubles factors[2] = {from_bf16(pairs << 16), from_bf16(pairs & 0xffff0000)};
      ModelDoubles sums[2] = {};  // of every first and every second of a pair
      for (int k = 0; k < num_pairs; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] = widen_model(round_flushed(columns[k][i] * factors[i][k] + sums[i]));
        }
      }
      const ModelFloats sum = round_flushed(sums[0] + sums[1]);
      const ModelDoubles total = flush_model(widen_model(row<ModelFloats, kSum>(m)));
      set_row<kSum>(m, round_flushed(total + widen_model(sum)));
    }
  }

  // Sums of 64 products stay below 2^24: fp32 has them exactly.
  template <int kSum, int kRows, int kColumns>
  static void multiply_int8() {
    require_shapes<kSum, kRows, kColumns>();
    const int num_quads = state.config.rows[kColumns];
    ModelFloats columns[16][4];
    for (int k = 0; k < num_quads; ++k) {
      const auto quads = row<ModelInts, kColumns>(k);
      for (int i = 0; i < 4; ++i) {
        columns[k][i] = __builtin_convertvector((quads >> (8 * i)) & 0xff, ModelFloats);
      }
    }
    for (int m = 0; m < state.config.rows[kSum]; ++m) {
      ModelFloats sum = {};
      for (int k = 0; k < num_quads; ++k) {
        for (int i = 0; i < 4; ++i) {
          const auto factor = static_cast<int8_t>(state.tiles[kRows][m][4 * k + i]);
          sum += columns[k][i] * static_cast<float>(factor);
        }
      }
      const auto total = row<ModelWords, kSum>(m);
      set_row<kSum>(m, total + (ModelWords) __builtin_convertvector(sum, ModelInts));
    }
  }

 private:
  static inline thread_local TileState state;

  static void require(bool holds) {
    if (!holds) __builtin_trap();
  }

  template <int kSum, int kRows, int kColumns>
  static void require_shapes() {
    const TileConfig& shapes = state.config;
    require(state.is_configured && shapes.rows[kSum] == shapes.rows[kRows] &&
            shapes.row_bytes[kSum] == shapes.row_bytes[kColumns] &&
            shapes.row_bytes[kRows] == 4 * shapes.rows[kColumns]);
  }

  template <class Vector, int kTile>
  static Vector row(int index) {
    Vector out;
    __builtin_memcpy(&out, state.tiles[kTile][index], sizeof(out));
    return out;
  }
  template <int kTile, class Vector>
  static void set_row(int index, const Vector& values) {
    __builtin_memcpy(state.tiles[kTile][index], &values, sizeof(values));
  }
};
