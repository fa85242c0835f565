// The rows of specengine/kernels/types/rows.py, a named tuple of tensors, as the core takes them.
#pragma once

#include <vector>

#include "core/rows.h"
#include "python/tensor_checks.h"

namespace specengine {

using RowTensors = std::vector<Tensor>;

template <class T>
constexpr at::ScalarType kColumnType = at::kFloat;
template <>
inline constexpr at::ScalarType kColumnType<int32_t> = at::kInt;
template <>
inline constexpr at::ScalarType kColumnType<int64_t> = at::kLong;

// Memory for `count` rows.
class RowOutputs {
 public:
  explicit RowOutputs(int64_t count) {
#define COLUMN(type, name)                                    \
  tensors.push_back(empty_small({count}, kColumnType<type>)); \
  rows.name = tensors.back().data_ptr<type>();
    SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
  }

  RowTensors tensors;
  WritableRows rows;
};

// `count` rows, checked and kept alive.
class RowInputs {
 public:
  RowInputs(const RowTensors& tensors, int64_t count) {
    size_t num_columns = 0;
#define COLUMN(type, name) ++num_columns;
    SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
    if (tensors.size() != num_columns)
      fail("rows: expected ", num_columns, " columns, got ", tensors.size());
    kept_.reserve(num_columns);
#define COLUMN(type, name)                                                                \
  kept_.push_back(small_input(tensors[kept_.size()], #name, kColumnType<type>, {count})); \
  rows_.name = kept_.back().data_ptr<type>();
    SPECENGINE_ROW_COLUMNS(COLUMN)
#undef COLUMN
  }

  const SamplingRows& operator*() const { return rows_; }

 private:
  std::vector<Tensor> kept_;
  SamplingRows rows_;
};

}  // namespace specengine
