// The processor's tiles (AMX); tiles_emulated.h defines the same names with the same meaning.
// Written as assembly: the compilers' own functions don't say that they read and write memory (GCC)
// or want to choose the registers (Clang).

struct Tiles {
  // Sixteen rows of up to 64 bytes each, their shapes as configured, from here to release().
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows `stride` bytes apart.
  template <int kTile>
  static void load(const void* base, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* base, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
  }

  // kSum[m][n] += sum over k of kRows[m][k] * kColumns[k][n], k and k + 1 of bf16 beside each
  // other.
  template <int kSum, int kRows, int kColumns>
  static void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kColumns));
  }
  // The same of int8 and, in kColumns, uint8, four of them beside each other.
  template <int kSum, int kRows, int kColumns>
  static void multiply_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kColumns));
  }
};
