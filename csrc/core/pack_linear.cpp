#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// Elements below which a thread is not worth waking.
constexpr int64_t kMinParallelElements = int64_t{1} << 17;

int64_t num_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// One output channel to int8, ties to even (as the sum with 1.5 * 2^23 rounds); returns its scale.
float quantize_channel(const float* weight, int64_t k, int8_t* out) {
  float largest = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    largest = std::max(largest, std::fabs(weight[i]));
    poison += weight[i] * 0.0f;
  }
  const float scale = largest / 127.0f + poison;
  const bool is_usable = scale > 0.0f;  // neither a zero channel nor one with NaN or infinity
  for (int64_t i = 0; i < k; ++i) {
    const float ratio = is_usable ? weight[i] / scale : 0.0f;
    const float rounded = (ratio + 0x1.8p23f) - 0x1.8p23f;
    out[i] = static_cast<int8_t>(std::clamp(rounded, -127.0f, 127.0f));
  }
  return scale;
}

// A panel's columns as floats [columns, in_features], read in the order in which they lie in
// memory.
void gather_columns(const WeightView& weight, int64_t first, int64_t columns, float* out) {
  const int64_t k = weight.in_features;
  const auto at = [&](int64_t column, int64_t i) {
    return load_float(weight.data, weight.dtype,
                      (first + column) * weight.out_stride + i * weight.in_stride);
  };
  if (weight.in_stride <= weight.out_stride) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t i = 0; i < k; ++i) out[column * k + i] = at(column, i);
    }
  } else {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t column = 0; column < columns; ++column) out[column * k + i] = at(column, i);
    }
  }
}

// One column's group of codes where the panel has it.
void place_codes(const int8_t* codes, int64_t column, DType dtype, char* out) {
  const bool is_byte = dtype == DType::kInt8Group;
  const int offset = dtype == DType::kInt4Min ? 0 : code_offset(dtype);
  const auto code = [&](int64_t i) { return static_cast<uint8_t>(codes[i] + offset); };
  for (int64_t i = 0; i < kGroupK; i += is_byte ? 4 : 8, out += 4 * kPanelColumns) {
    for (int64_t j = 0; j < 4; ++j) {
      out[4 * column + j] =
          static_cast<char>(is_byte ? code(i + j) : code(i + j) | code(i + 4 + j) << 4);
    }
  }
}

}  // namespace

int64_t packed_bytes(int64_t out_features, int64_t in_features, DType dtype) {
  return num_panels(out_features) * panel_bytes(in_features, dtype);
}

void pack_linear(const WeightView& weight, DType dtype, void* panels, float* scale) {
  const int64_t n = weight.out_features, k = weight.in_features;
  const int64_t depth = depth_of(dtype);
  const int64_t panel_size = panel_bytes(k, dtype);
  parallel_for(num_panels(n), n * k >= kMinParallelElements, [&](int64_t panel) {
    static thread_local Scratch<float> column_scratch;
    static thread_local Scratch<int8_t> quantized_scratch;
    const int64_t first = panel * kPanelColumns;
    const int64_t columns = std::min<int64_t>(kPanelColumns, n - first);
    float* values = column_scratch.reserve(kPanelColumns * k);
    gather_columns(weight, first, columns, values);
    char* base = static_cast<char*>(panels) + panel * panel_size;
    std::memset(base, dtype == DType::kInt8 ? -128 : 0, panel_size);
    const auto place = [&](int64_t column, int64_t i) {
      return (i / depth * kPanelColumns + column) * depth + i % depth;
    };
    for (int64_t column = 0; column < columns; ++column) {
      const float* channel = values + column * k;
      if (dtype == DType::kInt8) {
        int8_t* quantized = quantized_scratch.reserve(k);
        scale[first + column] = quantize_channel(channel, k, quantized);
        for (int64_t i = 0; i < k; ++i) base[place(column, i)] = quantized[i] ^ -128;
      } else {
        for (int64_t i = 0; i < k; ++i) {
          store_float(base, dtype, place(column, i), channel[i]);
        }
      }
    }
  });
}

void pack_grouped(const GroupedView& weight, DType dtype, void* panels) {
  const int64_t n = weight.out_features, k = weight.in_features, num_groups = k / kGroupK;
  const int64_t panel_size = panel_bytes(k, dtype);
  parallel_for(num_panels(n), n * k >= kMinParallelElements, [&](int64_t panel) {
    char* base = static_cast<char*>(panels) + panel * panel_size;
    std::memset(base, 0, panel_size);
    const int64_t first = panel * kPanelColumns;
    const int64_t columns = std::min<int64_t>(kPanelColumns, n - first);
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t row = (first + column) * num_groups;
      for (int64_t group = 0; group < num_groups; ++group) {
        char* out = base + group * group_bytes(dtype);
        std::memcpy(out + 2 * column, weight.scale + row + group, 2);
        if (weight.minimum != nullptr) {
          std::memcpy(out + 2 * (kPanelColumns + column), weight.minimum + row + group, 2);
        }
        place_codes(weight.codes + (row + group) * kGroupK, column, dtype,
                    out + group_header_bytes(dtype));
      }
    }
  });
}

}  // namespace specengine
