// Sixteen-lane vectors in the compiler's own vector types, for any processor; see simd_avx512.h.
// There is no fused multiply-add here: fma(a, b, c) rounds twice, always, so this instruction set
// is row-invariant as the others are, with other bits.

constexpr int kNumRegisters = 4;
constexpr int kMaxBlockRows = 3;
constexpr int column_vectors(int num_rows, bool) { return num_rows == 1 ? 2 : 1; }
constexpr bool is_block(int rows, int vectors, bool) {
  return rows == 1 ? vectors == 2 : vectors == 1 && rows <= kMaxBlockRows;
}
constexpr bool kHasBf16Dot = false;

typedef float Float16Lanes __attribute__((vector_size(64)));
typedef uint32_t Uint16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));
typedef double Double16Lanes __attribute__((vector_size(128)));
typedef int64_t Long16Lanes __attribute__((vector_size(128)));

struct F16 {
  Float16Lanes v;
};
struct U16 {
  Uint16Lanes v;
};
struct Mask {
  Int16Lanes v;
};
struct D16 {
  Double16Lanes v;
};

inline F16 set1(float x) { return {Float16Lanes{} + x}; }
inline F16 load(const float* p) {
  F16 r;
  __builtin_memcpy(&r.v, p, 64);
  return r;
}
inline F16 load_first(const float* p, int n, float rest) {
  F16 r = set1(rest);
  for (int i = 0; i < n; ++i) r.v[i] = p[i];
  return r;
}
inline void store(float* p, F16 x) { __builtin_memcpy(p, &x.v, 64); }
inline void store_first(float* p, F16 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}

inline F16 operator+(F16 a, F16 b) { return {a.v + b.v}; }
inline F16 operator-(F16 a, F16 b) { return {a.v - b.v}; }
inline F16 operator*(F16 a, F16 b) { return {a.v * b.v}; }
inline F16 operator/(F16 a, F16 b) { return {a.v / b.v}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {a.v * b.v + c.v}; }
inline F16 minimum(F16 a, F16 b) { return {a.v < b.v ? a.v : b.v}; }
inline F16 maximum(F16 a, F16 b) { return {a.v > b.v ? a.v : b.v}; }
// For magnitudes below 2^22.
inline F16 round_nearest(F16 a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }

inline Mask operator<(F16 a, F16 b) { return {a.v < b.v}; }
inline Mask operator<=(F16 a, F16 b) { return {a.v <= b.v}; }
inline Mask operator==(F16 a, F16 b) { return {a.v == b.v}; }
inline Mask is_nan(F16 a) { return {a.v != a.v}; }
inline Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
inline Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
inline uint32_t to_bits(Mask m) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (m.v[i] ? 1u : 0u) << i;
  return bits;
}
inline F16 select(Mask m, F16 yes, F16 no) { return {m.v ? yes.v : no.v}; }
inline U16 select(Mask m, U16 yes, U16 no) { return {m.v ? yes.v : no.v}; }

inline U16 set1_u(uint32_t x) { return {Uint16Lanes{} + x}; }
inline U16 iota() { return {Uint16Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}; }
inline void store(uint32_t* p, U16 x) { __builtin_memcpy(p, &x.v, 64); }
inline U16 operator+(U16 a, U16 b) { return {a.v + b.v}; }
inline U16 operator-(U16 a, U16 b) { return {a.v - b.v}; }
inline U16 operator^(U16 a, U16 b) { return {a.v ^ b.v}; }
inline U16 operator&(U16 a, U16 b) { return {a.v & b.v}; }
inline U16 operator|(U16 a, U16 b) { return {a.v | b.v}; }
template <int kBits>
inline U16 shift_left(U16 a) {
  return {a.v << kBits};
}
template <int kBits>
inline U16 shift_right(U16 a) {
  return {a.v >> kBits};
}
inline void multiply_wide(U16 a, uint32_t b, U16& high, U16& low) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{a.v[i]} * b;
    high.v[i] = static_cast<uint32_t>(product >> 32);
    low.v[i] = static_cast<uint32_t>(product);
  }
}
inline F16 as_float(U16 a) { return {reinterpret_cast<Float16Lanes>(a.v)}; }
inline U16 as_bits(F16 a) { return {reinterpret_cast<Uint16Lanes>(a.v)}; }
inline F16 from_uint(U16 a) { return {__builtin_convertvector(a.v, Float16Lanes)}; }
inline F16 from_int(U16 a) {
  return {__builtin_convertvector(reinterpret_cast<Int16Lanes>(a.v), Float16Lanes)};
}
inline U16 to_int(F16 a) {
  return {reinterpret_cast<Uint16Lanes>(__builtin_convertvector(a.v, Int16Lanes))};
}

inline F16 load_bf16(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = bf16_to_float(p[i]);
  return r;
}
inline F16 load_fp16(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fp16_to_float(p[i]);
  return r;
}
// On little-endian machines the first of a pair or quad is in the lowest bits, as everywhere else.
inline U16 load_words(const void* p) {
  U16 r;
  __builtin_memcpy(&r.v, p, 64);
  return r;
}
inline void store_halves(uint16_t* p, U16 x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}
inline void store_bytes(int8_t* p, U16 x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
constexpr bool kHasOffsetDot = false;
// Byte kByte of each word, signed.
template <int kByte>
inline Int16Lanes signed_byte(U16 x) {
  return reinterpret_cast<Int16Lanes>(x.v << (24 - 8 * kByte)) >> 24;
}
// See simd_avx2.h.
#include "isa/byte_digits.h"
template <int kBits>
struct CodeSum : ByteDigits {
  static constexpr int kMaxSums = 1;
  U16 sum;
  void begin(uint32_t start, U16 codes, U16 x) {
    sum = set1_u(start);
    add(codes, x);
  }
  void add(U16 codes, U16 x) {
    const auto product = [&]<int kByte>() {
      return reinterpret_cast<Int16Lanes>((codes.v >> (8 * kByte)) & 0xff) * signed_byte<kByte>(x);
    };
    const Int16Lanes products = product.template operator()<0>() +
                                product.template operator()<1>() +
                                product.template operator()<2>() + product.template operator()<3>();
    sum.v += reinterpret_cast<Uint16Lanes>(products);
  }
  U16 total(uint32_t) const { return sum; }
};
inline U16 dot_int8(U16 sum, U16 offset_weights, U16 x) {
  const U16 w = offset_weights ^ set1_u(0x80808080);
  const Int16Lanes products =
      signed_byte<0>(w) * signed_byte<0>(x) + signed_byte<1>(w) * signed_byte<1>(x) +
      signed_byte<2>(w) * signed_byte<2>(x) + signed_byte<3>(w) * signed_byte<3>(x);
  return {sum.v + reinterpret_cast<Uint16Lanes>(products)};
}
inline F16 multiply_add(F16 sum, F16 a, F16 b) { return fma(a, b, sum); }
inline F16 dot_bf16(F16 sum, U16, U16) { return sum; }

inline D16 set1_d(double x) { return {Double16Lanes{} + x}; }
inline D16 zero_d() { return {Double16Lanes{}}; }
inline D16 widen(F16 a) { return {__builtin_convertvector(a.v, Double16Lanes)}; }
inline void store(double* p, D16 a) { __builtin_memcpy(p, &a.v, 128); }
inline D16 operator+(D16 a, D16 b) { return {a.v + b.v}; }
inline D16 operator*(D16 a, D16 b) { return {a.v * b.v}; }
inline D16 fma(D16 a, D16 b, D16 c) { return {a.v * b.v + c.v}; }
inline D16 maximum(D16 a, D16 b) { return {a.v > b.v ? a.v : b.v}; }
inline D16 round_nearest(D16 a) { return {(a.v + 0x1.8p52) - 0x1.8p52}; }
inline D16 scale_by_power(D16 a, D16 n) {
  const Long16Lanes bits = reinterpret_cast<Long16Lanes>(n.v + (0x1.8p52 + 1023)) << 52;
  return {a.v * reinterpret_cast<Double16Lanes>(bits)};
}

inline float reduce_add(F16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline F16 reduce_add_each(const F16 (&rows)[16]) {
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = reduce_add(rows[i]);
  return load(lanes);
}
inline int32_t reduce_add(U16 a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i];
  return static_cast<int32_t>(sum);
}
inline float reduce_max(F16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
inline double reduce_add(D16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline int compress(float* p, Mask m, F16 a) {
  int count = 0;
  for (int i = 0; i < 16; ++i) {
    if (m.v[i]) p[count++] = a.v[i];
  }
  return count;
}
