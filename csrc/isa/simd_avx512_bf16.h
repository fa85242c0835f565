// The products of AVX-512 with BF16. Included after simd_avx512.h.

constexpr bool kHasBf16Dot = true;
inline F16 dot_bf16(F16 sum, U16 a, U16 b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
