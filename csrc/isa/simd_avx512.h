// Sixteen-lane vectors on AVX-512. Included inside an instruction set's namespace; simd_avx2.h and
// simd_portable.h define the same names with the same meaning.
// kHasBf16Dot, dot_bf16 (sums of products of pairs), kHasOffsetDot and dot_int8 (of quads) stand in
// the kernels_*.cpp.
// The reductions of all add lanes (i, i + 8), then (i, i + 4), (i, i + 2), (i, i + 1).

// Register blocks: up to kMaxBlockRows rows by column_vectors(rows) vectors of output columns.
// F16 values that fit the registers.
constexpr int kNumRegisters = 32;
constexpr int kMaxBlockRows = 6;
constexpr int column_vectors(int, bool) { return 4; }
constexpr bool is_block(int, int vectors, bool) { return vectors == 4; }

struct F16 {
  __m512 v;
};
struct U16 {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};
struct D16 {
  __m512d lo, hi;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load_first(const float* p, int n, float rest) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first_lanes(n), p)};
}
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
inline void store_first(float* p, F16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }

inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
inline F16 minimum(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 maximum(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 round_nearest(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline Mask operator<(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator<=(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask operator==(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask is_nan(F16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
inline Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
inline uint32_t to_bits(Mask m) { return m.v; }
inline F16 select(Mask m, F16 yes, F16 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
inline U16 select(Mask m, U16 yes, U16 no) { return {_mm512_mask_blend_epi32(m.v, no.v, yes.v)}; }

inline U16 set1_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline U16 iota() {
  return {_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
}
inline void store(uint32_t* p, U16 x) { _mm512_storeu_si512(p, x.v); }
inline U16 operator+(U16 a, U16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline U16 operator-(U16 a, U16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline U16 operator^(U16 a, U16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline U16 operator&(U16 a, U16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline U16 operator|(U16 a, U16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
inline U16 shift_left(U16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline U16 shift_right(U16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
// Both halves of the 64-bit products.
inline void multiply_wide(U16 a, uint32_t b, U16& high, U16& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
inline F16 as_float(U16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline U16 as_bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline F16 from_uint(U16 a) { return {_mm512_cvtepu32_ps(a.v)}; }
inline F16 from_int(U16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// For values that are integers in int32's range.
inline U16 to_int(F16 a) { return {_mm512_cvttps_epi32(a.v)}; }

inline F16 load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F16 load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Sixteen words: pairs of bf16 or quads of int8, the first in the lowest bits.
inline U16 load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
// The low half and the low byte of each word.
inline void store_halves(uint16_t* p, U16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
inline void store_bytes(int8_t* p, U16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
inline F16 multiply_add(F16 sum, F16 a, F16 b) { return fma(a, b, sum); }

inline D16 zero_d() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline D16 set1_d(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline D16 widen(F16 a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
inline void store(double* p, D16 a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
inline D16 operator+(D16 a, D16 b) {
  return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)};
}
inline D16 operator*(D16 a, D16 b) {
  return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)};
}
inline D16 fma(D16 a, D16 b, D16 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
inline D16 maximum(D16 a, D16 b) { return {_mm512_max_pd(a.lo, b.lo), _mm512_max_pd(a.hi, b.hi)}; }
inline D16 round_nearest(D16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm512_roundscale_pd(a.lo, kMode), _mm512_roundscale_pd(a.hi, kMode)};
}
inline __m512d power_of_two(__m512d n) {
  const __m512i bits = _mm512_castpd_si512(_mm512_add_pd(n, _mm512_set1_pd(0x1.8p52 + 1023)));
  return _mm512_castsi512_pd(_mm512_slli_epi64(bits, 52));
}
// a * 2^n for integer-valued n in [-1022, 1023].
inline D16 scale_by_power(D16 a, D16 n) {
  return {_mm512_mul_pd(a.lo, power_of_two(n.lo)), _mm512_mul_pd(a.hi, power_of_two(n.hi))};
}

inline float reduce_add(F16 a) {
  const __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}
// lanes[t] = reduce_add(rows[t]), by transposition: the same additions, a third of the shuffles.
inline F16 reduce_add_each(const F16 (&rows)[16]) {
  __m512 s1[8], s2[4], s3[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = rows[2 * i].v, b = rows[2 * i + 1].v;
    s1[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = s1[2 * i], b = s1[2 * i + 1];
    s2[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = s2[2 * i], b = s2[2 * i + 1];
    s3[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_ps(s3[0], s3[1], 0x88), _mm512_shuffle_ps(s3[0], s3[1], 0xDD));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return {_mm512_permutexvar_ps(order, sums)};
}
inline int32_t reduce_add(U16 a) { return _mm512_reduce_add_epi32(a.v); }
inline float reduce_max(F16 a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_add(D16 a) {
  const __m512d v8 = _mm512_add_pd(a.lo, a.hi);
  const __m256d v4 = _mm256_add_pd(_mm512_castpd512_pd256(v8), _mm512_extractf64x4_pd(v8, 1));
  const __m128d v2 = _mm_add_pd(_mm256_castpd256_pd128(v4), _mm256_extractf128_pd(v4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)));
}
// Appends the selected lanes, in order; returns how many.
inline int compress(float* p, Mask m, F16 a) {
  _mm512_mask_compressstoreu_ps(p, m.v, a.v);
  return __builtin_popcount(m.v);
}
