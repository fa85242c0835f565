// Philox4x32-10, one counter at a time (Salmon et al., SC'11). See specengine/rng.py for the table
// of streams; the vector version in isa/math.h agrees with this one on every bit.
#pragma once

#include <array>
#include <cstdint>

namespace specengine {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

constexpr uint32_t kStreamTarget = 0;
constexpr uint32_t kStreamDraft = 1;
constexpr uint32_t kStreamAccept = 2;

// What one race or one accept test is keyed by.
struct NoiseKey {
  uint64_t seed;
  uint32_t position;
  uint32_t stream;
  uint32_t round_base;
};

inline std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, uint32_t k0,
                                          uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product_0 = uint64_t{counter[0]} * kPhiloxMultiplier0;
    const uint64_t product_1 = uint64_t{counter[2]} * kPhiloxMultiplier1;
    counter = {
        static_cast<uint32_t>(product_1 >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(product_1),
        static_cast<uint32_t>(product_0 >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(product_0)};
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return counter;
}

inline uint32_t accept_bits(uint64_t seed, uint32_t position, uint32_t round_base,
                            uint32_t candidate) {
  return philox4x32({candidate, position, kStreamAccept, round_base}, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32))[0];
}

}  // namespace specengine
