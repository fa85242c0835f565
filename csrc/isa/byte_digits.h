// Of CodeSum where rows meet codes as digits of a byte each. Included before CodeSum.

struct ByteDigits {
  static constexpr bool kHasWideDigits = false;
  // Sixteen columns' quads of codes, and a quad of a digit that they are multiplied with.
  using Codes = U16;
  using Factor = U16;
  static Codes codes(U16 quads) { return quads; }
  static Factor factor(const uint32_t* digit, int quad) { return set1_u(digit[quad]); }
};
