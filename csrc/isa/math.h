// exp, log, GELU and Philox on sixteen lanes. An element's result depends on that element only.

// e^x to about 1 ulp for x up to 88, where it stays; 0 below -87.3: a denormal result would cost a
// microcode assist, and nothing here can use it.
inline F16 exp(F16 x) {
  const F16 clamped = maximum(set1(-87.3f), minimum(set1(88.0f), x));  // NaN passes
  const F16 n = round_nearest(clamped * set1(1.44269504088896341f));
  F16 r = fma(n, set1(-0.693145751953125f), clamped);
  r = fma(n, set1(-1.42860682030941723e-6f), r);
  // Taylor to r^7: the remainder at |r| <= ln(2) / 2 is below 2^-31.
  F16 p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p * r, r, r) + set1(1.0f);
  const F16 power = as_float(shift_left<23>(to_int(n) + set1_u(127)));
  return select(x < set1(-87.3f), set1(0.0f), p * power);
}

// e^x in double for x in [-700, 0], to about 1 ulp; e^-700 below, which is nothing beside e^0.
inline D16 exp(D16 x) {
  const D16 clamped = maximum(x, set1_d(-700.0));
  const D16 n = round_nearest(clamped * set1_d(1.4426950408889634074));
  D16 r = fma(n, set1_d(-6.93147180369123816490e-01), clamped);
  r = fma(n, set1_d(-1.90821492927058770002e-10), r);
  D16 p = set1_d(1.0 / 6227020800.0);
  p = fma(p, r, set1_d(1.0 / 479001600.0));
  p = fma(p, r, set1_d(1.0 / 39916800.0));
  p = fma(p, r, set1_d(1.0 / 3628800.0));
  p = fma(p, r, set1_d(1.0 / 362880.0));
  p = fma(p, r, set1_d(1.0 / 40320.0));
  p = fma(p, r, set1_d(1.0 / 5040.0));
  p = fma(p, r, set1_d(1.0 / 720.0));
  p = fma(p, r, set1_d(1.0 / 120.0));
  p = fma(p, r, set1_d(1.0 / 24.0));
  p = fma(p, r, set1_d(1.0 / 6.0));
  p = fma(p, r, set1_d(0.5));
  p = fma(p, r, set1_d(1.0));
  p = fma(p, r, set1_d(1.0));
  return scale_by_power(p, n);
}

// ln x for positive normal x, to about 1 ulp; -inf for 0 and below. (Cephes logf.)
inline F16 log(F16 x) {
  const U16 bits = as_bits(x);
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const U16 shifted = bits - set1_u(0x3f3504f3);
  const F16 e = from_int(shift_right<23>(shifted + set1_u(0x40000000)) - set1_u(128));
  const F16 m = as_float((shifted & set1_u(0x007fffff)) + set1_u(0x3f3504f3));
  const F16 r = m - set1(1.0f);
  const F16 r2 = r * r;
  F16 p = set1(7.0376836292e-2f);
  p = fma(p, r, set1(-1.1514610310e-1f));
  p = fma(p, r, set1(1.1676998740e-1f));
  p = fma(p, r, set1(-1.2420140846e-1f));
  p = fma(p, r, set1(1.4249322787e-1f));
  p = fma(p, r, set1(-1.6668057665e-1f));
  p = fma(p, r, set1(2.0000714765e-1f));
  p = fma(p, r, set1(-2.4999993993e-1f));
  p = fma(p, r, set1(3.3333331174e-1f));
  F16 y = p * r * r2;
  y = fma(e, set1(-2.12194440e-4f), y);
  y = fma(r2, set1(-0.5f), y);
  const F16 result = fma(e, set1(0.693359375f), r + y);
  return select(x <= set1(0.0f), set1(-__builtin_inff()), result);
}

// x / (1 + e^{-2u}), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form without its cancellation.
inline F16 gelu_tanh(F16 x) {
  const F16 cubic = fma(x * x, set1(0.044715f), set1(1.0f));
  const F16 u = x * cubic * set1(0.7978845608028654f);
  return x / (set1(1.0f) + exp(u * set1(-2.0f)));
}

// erf by a rational approximation on [-4, 4], 1 beyond (as in Eigen and XLA).
inline F16 erf(F16 x) {
  const F16 c = maximum(set1(-4.0f), minimum(set1(4.0f), x));
  const F16 s = c * c;
  F16 p = set1(-2.72614225801306e-10f);
  p = fma(p, s, set1(2.77068142495902e-08f));
  p = fma(p, s, set1(-2.10102402082508e-06f));
  p = fma(p, s, set1(-5.69250639462346e-05f));
  p = fma(p, s, set1(-7.34990630326855e-04f));
  p = fma(p, s, set1(-2.95459980854025e-03f));
  p = fma(p, s, set1(-1.60960333262415e-02f));
  F16 q = set1(-1.45660718464996e-05f);
  q = fma(q, s, set1(-2.13374055278905e-04f));
  q = fma(q, s, set1(-1.68282697438203e-03f));
  q = fma(q, s, set1(-7.37332916720468e-03f));
  q = fma(q, s, set1(-1.42647390514189e-02f));
  return c * p / q;
}

inline F16 gelu(F16 x) {
  return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678118654752f)));
}

inline F16 silu(F16 x) { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }

inline F16 activate(F16 x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return maximum(set1(0.0f), x);  // NaN stays NaN
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSwiglu:  // of two columns: the caller's
    case Activation::kNone:
      break;
  }
  return x;
}

struct Philox16 {
  U16 lane[4];
};

// Sixteen consecutive counters c0, c0 + 1, …
inline Philox16 philox(uint32_t c0, const NoiseKey& key) {
  U16 c[4] = {iota() + set1_u(c0), set1_u(key.position), set1_u(key.stream),
              set1_u(key.round_base)};
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U16 high_0, low_0, high_1, low_1;
    multiply_wide(c[0], kPhiloxMultiplier0, high_0, low_0);
    multiply_wide(c[2], kPhiloxMultiplier1, high_1, low_1);
    c[0] = high_1 ^ c[1] ^ set1_u(k0);
    c[1] = low_1;
    c[2] = high_0 ^ c[3] ^ set1_u(k1);
    c[3] = low_0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// u = (r + 1/2) 2^-32.
inline F16 uniform(U16 bits) { return (from_uint(bits) + set1(0.5f)) * set1(0x1p-32f); }

inline F16 gumbel(U16 bits) {
  const F16 u = uniform(bits);
  const F16 complement = uniform(bits ^ set1_u(0xffffffff));
  F16 series = fma(u, set1(0.25f), set1(1.0f / 3));
  series = fma(u, series, set1(0.5f));
  series = u * fma(u, series, set1(1.0f));
  const F16 exponential = select(u < set1(0x1p-5f), series, set1(0.0f) - log(complement));
  return set1(0.0f) - log(exponential);
}

// Never below gumbel(bits): E >= u >= 2^e gives g <= -e ln 2; the margin covers all rounding.
inline F16 gumbel_bound(U16 bits) {
  const F16 exponent = from_int(shift_right<23>(as_bits(uniform(bits)))) - set1(127.0f);
  return fma(exponent, set1(-0.69314718f), set1(1e-3f));
}
