// The shapes of the eight tile registers, as LDTILECFG reads them.
#pragma once

#include <cstdint>

namespace specengine {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set_shape(int tile, int num_rows, int num_row_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_row_bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace specengine
