// Sums of products with codes where no instruction multiplies bytes without saturating. Included
// after NibbleSum and PairSum.
#include "isa/byte_digits.h"

// The sum over a group of codes of kBits without sign times a digit; `start` is what it starts
// from. kMaxSums times the digits of them fit the registers beside what they are made of.
template <int kBits>
struct CodeSum;

template <>
struct CodeSum<4> : ByteDigits {
  static constexpr int kMaxSums = NibbleSum::kMaxSums;
  NibbleSum sum;
  void begin(uint32_t, Codes codes, Factor x) { sum.begin(codes, x); }
  void add(Codes codes, Factor x) { sum.add(codes, x); }
  U16 total(uint32_t start) const { return sum.total() + set1_u(start); }
};

// Codes of 8 bits are widened to 16, and so are digits: all but the lowest of a number are one. A
// quad of a digit is a word for its first and third k, and one for the others.
template <>
struct CodeSum<8> {
  static constexpr bool kHasWideDigits = true;
  static constexpr int kMaxSums = PairSum::kMaxSums;
  struct Codes {
    U16 even, odd;
  };
  using Factor = Codes;
  static Codes codes(U16 quads) {
    const U16 low_bytes = set1_u(0x00ff00ff);
    return {quads & low_bytes, shift_right<8>(quads) & low_bytes};
  }
  static Factor factor(const uint32_t* digit, int quad) {
    return {set1_u(digit[2 * quad]), set1_u(digit[2 * quad + 1])};
  }
  PairSum sum;
  void begin(uint32_t start, Codes codes, Factor x) {
    sum.start(start);
    add(codes, x);
  }
  void add(Codes codes, Factor x) {
    sum.add(codes.even, x.even);
    sum.add(codes.odd, x.odd);
  }
  U16 total(uint32_t) const { return sum.total(); }
};
