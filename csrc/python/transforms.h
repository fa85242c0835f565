// The tables of specengine/kernels/types/transforms.py as the core takes them.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "core/transforms.h"
#include "python/tensor_checks.h"

namespace specengine {

using TransformTensors = std::array<Tensor, 9>;

// The tensors are the caller's to keep alive.
inline std::optional<TransformTables> transform_tables(
    const std::optional<TransformTensors>& tensors) {
  if (!tensors) return std::nullopt;
  const auto& [history, num_entries, token, value, first, end, prefix_start, prefix_length,
               prefix] = *tensors;
  const auto rows = matrix<const int32_t>(history, "history", -1, -1);
  dense_input(num_entries, "num_entries", at::kInt, {rows.num_rows});
  dense_input(token, "token", at::kInt, {rows.num_rows, -1});
  const std::vector<int64_t> shape{rows.num_rows, token.size(1)};
  dense_input(value, "value", at::kFloat, shape);
  dense_input(first, "first", at::kInt, shape);
  dense_input(end, "end", at::kInt, shape);
  dense_input(prefix_start, "prefix_start", at::kInt, shape);
  dense_input(prefix_length, "prefix_length", at::kInt, shape);
  dense_input(prefix, "prefix", at::kInt, {rows.num_rows, -1});
  return TransformTables{rows,
                         num_entries.data_ptr<int32_t>(),
                         token.data_ptr<int32_t>(),
                         value.data_ptr<float>(),
                         first.data_ptr<int32_t>(),
                         end.data_ptr<int32_t>(),
                         prefix_start.data_ptr<int32_t>(),
                         prefix_length.data_ptr<int32_t>(),
                         token.size(1),
                         prefix.data_ptr<int32_t>(),
                         prefix.size(1)};
}

}  // namespace specengine
