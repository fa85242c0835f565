// Sums of products with codes out of sums of products with numbers of 4 bits, where no instruction
// multiplies codes of 8 bits without saturating. Included after NibbleSum.

// The sum over a group of codes of kBits without sign, in quads, times quads of int8; `start` is
// what it starts from. kMaxSums times kDigits of them fit the registers beside what they are made
// of.
template <int kBits>
struct CodeSum;

template <>
struct CodeSum<4> {
  static constexpr int kMaxSums = NibbleSum::kMaxSums;
  NibbleSum sum;
  void start(uint32_t) { sum.start(); }
  void add(U16 codes, U16 x) { sum.add(codes, x); }
  U16 total(uint32_t start) const { return sum.total() + set1_u(start); }
};

template <>
struct CodeSum<8> {
  static constexpr int kMaxSums = NibbleSum::kMaxSums / 2;
  NibbleSum high, low;
  void start(uint32_t) {
    high.start();
    low.start();
  }
  void add(U16 codes, U16 x) {
    const U16 nibbles = set1_u(0x0f0f0f0f);
    high.add(shift_right<4>(codes) & nibbles, x);
    low.add(codes & nibbles, x);
  }
  U16 total(uint32_t start) const {
    return shift_left<4>(high.total()) + low.total() + set1_u(start);
  }
};
