// Sixteen-lane vectors on AVX2 with FMA and F16C; see simd_avx512.h.

constexpr int kNumRegisters = 8;
constexpr int kMaxBlockRows = 6;
// Integer sums wait for nothing and need no second column.
constexpr int column_vectors(int num_rows, bool is_integer) {
  return is_integer ? 1 : num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1;
}
constexpr bool is_block(int rows, int vectors, bool is_integer) {
  return vectors == column_vectors(rows, is_integer);
}
constexpr bool kHasBf16Dot = false;

struct F16 {
  __m256 lo, hi;
};
struct U16 {
  __m256i lo, hi;
};
struct Mask {
  __m256 lo, hi;
};
struct D16 {
  __m256d v[4];
};

inline Mask first_lanes(int n) {
  const __m256i count = _mm256_set1_epi32(n);
  const __m256i low = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i high = _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high))};
}

inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load_first(const float* p, int n, float rest) {
  const Mask m = first_lanes(n);
  const __m256 other = _mm256_set1_ps(rest);
  const __m256 lo = _mm256_maskload_ps(p, _mm256_castps_si256(m.lo));
  const __m256 hi = _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi));
  return {_mm256_blendv_ps(other, lo, m.lo), _mm256_blendv_ps(other, hi, m.hi)};
}
inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void store_first(float* p, F16 x, int n) {
  const Mask m = first_lanes(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), x.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), x.hi);
}

inline F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F16 operator/(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 minimum(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 maximum(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 round_nearest(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}

inline Mask operator<(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Mask operator<=(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
inline Mask operator==(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Mask is_nan(F16 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline Mask operator|(Mask a, Mask b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
}
inline Mask operator&(Mask a, Mask b) {
  return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)};
}
inline uint32_t to_bits(Mask m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) |
         (static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8);
}
inline F16 select(Mask m, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline F16 as_float(U16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline U16 as_bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline U16 select(Mask m, U16 yes, U16 no) {
  return as_bits(select(m, as_float(yes), as_float(no)));
}

inline U16 set1_u(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
inline U16 iota() {
  return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)};
}
inline void store(uint32_t* p, U16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.hi);
}
inline U16 operator+(U16 a, U16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline U16 operator-(U16 a, U16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline U16 operator^(U16 a, U16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline U16 operator&(U16 a, U16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline U16 operator|(U16 a, U16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
template <int kBits>
inline U16 shift_left(U16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
inline U16 shift_right(U16 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
inline void multiply_wide(__m256i a, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline void multiply_wide(U16 a, uint32_t b, U16& high, U16& low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  multiply_wide(a.lo, factor, high.lo, low.lo);
  multiply_wide(a.hi, factor, high.hi, low.hi);
}
inline F16 from_int(U16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Rounded once: both halves of the word are exact in fp32.
inline F16 from_uint(U16 a) {
  const F16 high = from_int(shift_right<16>(a));
  const F16 low = from_int(a & set1_u(0xffff));
  return fma(high, set1(65536.0f), low);
}
inline U16 to_int(F16 a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }

inline __m256 load_bf16_half(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F16 load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
inline F16 load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline U16 load_words(const void* p) {
  const auto* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
// The low bits of each word that `mask` has, 16 at most.
inline __m256i narrow(U16 x, int mask) {
  const __m256i bits = _mm256_set1_epi32(mask);
  const __m256i halves =
      _mm256_packus_epi32(_mm256_and_si256(x.lo, bits), _mm256_and_si256(x.hi, bits));
  return _mm256_permute4x64_epi64(halves, 0xD8);
}
inline void store_halves(uint16_t* p, U16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, 0xffff));
}
inline void store_bytes(int8_t* p, U16 x) {
  const __m256i halves = narrow(x, 0xff);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
constexpr bool kHasOffsetDot = false;
// Products of |w| and sign(w) x: neither they nor their sums in pairs leave 16 bits.
inline __m256i dot_int8(__m256i offset_weights, __m256i x) {
  const __m256i w = _mm256_xor_si256(offset_weights, _mm256_set1_epi8(-128));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
// In place, in assembly: sums fill twelve of sixteen registers, and GCC would move and spill them.
inline U16 dot_int8(U16 sum, U16 offset_weights, U16 x) {
  const U16 products = {dot_int8(offset_weights.lo, x.lo), dot_int8(offset_weights.hi, x.hi)};
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum.lo) : "x"(products.lo));
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum.hi) : "x"(products.hi));
  return sum;
}
// The sum over a group of products of quads of numbers of 4 bits without sign, and of int8: in
// pairs, of which 16 bits hold a whole group's (16 * 15 * 128).
struct NibbleSum {
  static constexpr int kMaxSums = 2;
  __m256i lo, hi;
  void begin(U16 codes, U16 x) {
    lo = _mm256_maddubs_epi16(codes.lo, x.lo);
    hi = _mm256_maddubs_epi16(codes.hi, x.hi);
  }
  void add(U16 codes, U16 x) {
    const __m256i products_lo = _mm256_maddubs_epi16(codes.lo, x.lo);
    const __m256i products_hi = _mm256_maddubs_epi16(codes.hi, x.hi);
    asm volatile("vpaddw %1, %0, %0" : "+x"(lo) : "x"(products_lo));
    asm volatile("vpaddw %1, %0, %0" : "+x"(hi) : "x"(products_hi));
  }
  U16 total() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(lo, ones), _mm256_madd_epi16(hi, ones)};
  }
};
// The sum of products of pairs of numbers of 16 bits.
struct PairSum {
  static constexpr int kMaxSums = 2;
  __m256i lo, hi;
  void start(uint32_t start) { lo = hi = _mm256_set1_epi32(static_cast<int>(start)); }
  void add(U16 a, U16 b) {
    const __m256i products_lo = _mm256_madd_epi16(a.lo, b.lo);
    const __m256i products_hi = _mm256_madd_epi16(a.hi, b.hi);
    asm volatile("vpaddd %1, %0, %0" : "+x"(lo) : "x"(products_lo));
    asm volatile("vpaddd %1, %0, %0" : "+x"(hi) : "x"(products_hi));
  }
  U16 total() const { return {lo, hi}; }
};
#include "isa/nibble_sums.h"
inline F16 multiply_add(F16 sum, F16 a, F16 b) {
  asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum.lo) : "x"(a.lo), "x"(b.lo));
  asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum.hi) : "x"(a.hi), "x"(b.hi));
  return sum;
}
inline F16 dot_bf16(F16 sum, U16, U16) { return sum; }

inline D16 set1_d(double x) {
  const __m256d v = _mm256_set1_pd(x);
  return {{v, v, v, v}};
}
inline D16 zero_d() { return set1_d(0.0); }
inline D16 widen(F16 a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1))}};
}
inline void store(double* p, D16 a) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.v[i]);
}
inline D16 operator+(D16 a, D16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
inline D16 operator*(D16 a, D16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}
inline D16 fma(D16 a, D16 b, D16 c) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return a;
}
inline D16 maximum(D16 a, D16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_max_pd(a.v[i], b.v[i]);
  return a;
}
inline D16 round_nearest(D16 a) {
  for (int i = 0; i < 4; ++i) {
    a.v[i] = _mm256_round_pd(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  return a;
}
inline D16 scale_by_power(D16 a, D16 n) {
  const __m256d magic = _mm256_set1_pd(0x1.8p52 + 1023);
  for (int i = 0; i < 4; ++i) {
    const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(n.v[i], magic));
    a.v[i] = _mm256_mul_pd(a.v[i], _mm256_castsi256_pd(_mm256_slli_epi64(bits, 52)));
  }
  return a;
}

inline float reduce_add(F16 a) {
  const __m256 v8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}
inline F16 reduce_add_each(const F16 (&rows)[16]) {
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = reduce_add(rows[i]);
  return load(lanes);
}
inline int32_t reduce_add(U16 a) {
  const __m256i v8 = _mm256_add_epi32(a.lo, a.hi);
  const __m128i v4 = _mm_add_epi32(_mm256_castsi256_si128(v8), _mm256_extracti128_si256(v8, 1));
  const __m128i v2 = _mm_add_epi32(v4, _mm_unpackhi_epi64(v4, v4));
  return _mm_cvtsi128_si32(_mm_add_epi32(v2, _mm_shuffle_epi32(v2, 1)));
}
inline float reduce_max(F16 a) {
  const __m256 v8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 v4 = _mm_max_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_max_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_max_ss(v2, _mm_movehdup_ps(v2)));
}
inline double reduce_add(D16 a) {
  const __m256d v4 = _mm256_add_pd(_mm256_add_pd(a.v[0], a.v[2]), _mm256_add_pd(a.v[1], a.v[3]));
  const __m128d v2 = _mm_add_pd(_mm256_castpd256_pd128(v4), _mm256_extractf128_pd(v4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)));
}
inline int compress(float* p, Mask m, F16 a) {
  float lanes[16];
  store(lanes, a);
  int count = 0;
  for (uint32_t bits = to_bits(m); bits != 0; bits &= bits - 1)
    p[count++] = lanes[__builtin_ctz(bits)];
  return count;
}
