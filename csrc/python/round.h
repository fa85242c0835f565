// A round whose tensors are bound and checked once: it runs again and again on what is in them.
#pragma once

#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/round.h"
#include "python/gil.h"
#include "python/rows.h"
#include "python/tensor_checks.h"
#include "python/threads.h"
#include "python/transforms.h"

namespace specengine {

// The state of all slots: tokens, block_table, seq_len, length_limit, num_speculative.
using StateTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// Drafts that are given, [B, k], and how many there are of each sequence.
using GivenTensors = std::tuple<Tensor, Tensor>;

class PyRound {
 public:
  PyRound(std::shared_ptr<Threads> threads, const RoundModel& target,
          const std::optional<RoundModel>& draft, int64_t num_fed, std::vector<Tensor> caches,
          StateTensors state, const Tensor& slots, const RowTensors& rows,
          std::optional<TransformTensors> transforms, std::optional<GivenTensors> given, int64_t k,
          int64_t draft_positions, std::optional<float> forced_acceptance)
      : threads_(std::move(threads)),
        caches_(std::move(caches)),
        state_(std::move(state)),
        slots_(dense_input(slots, "slots", at::kInt, {-1})),
        rows_(rows),
        transforms_(std::move(transforms)),
        given_(std::move(given)),
        draft_(draft),
        tables_(transform_tables(transforms_)) {
    const auto& [tokens, block_table, seq_len, length_limit, num_speculative] = state_;
    if (k < 0 || k > INT32_MAX) fail("k: ", k, " is outside 0 … 2^31 - 1");
    if (k > 0 && draft_.has_value() == given_.has_value())
      fail("k: drafts are drawn by a model, or given");
    if (num_fed != 1 && num_fed != 2) fail("num_fed: ", num_fed, " is neither 1 nor 2");
    const int64_t count = slots.size(0);
    call_.tokens = matrix<int32_t>(tokens, "tokens", -1, -1);
    const int64_t num_slots = call_.tokens.num_rows;
    call_.block_table = matrix<const int32_t>(block_table, "block_table", num_slots, -1);
    const auto of_slots = [num_slots](const Tensor& tensor, const char* name) {
      return dense_input(tensor, name, at::kInt, {num_slots}).data_ptr<int32_t>();
    };
    call_.seq_len = of_slots(seq_len, "seq_len");
    call_.length_limit = of_slots(length_limit, "length_limit");
    call_.num_speculative = {of_slots(num_speculative, "num_speculative"),
                             static_cast<size_t>(num_slots)};
    call_.slots = {slots_.data_ptr<int32_t>(), static_cast<size_t>(count)};
    check_rows(rows_, count);
    call_.rows = *RowInputs(rows_, count);
    call_.transforms = tables_ ? &*tables_ : nullptr;
    call_.forced_acceptance = forced_acceptance;
    call_.target = target;
    call_.draft = draft_ ? &*draft_ : nullptr;
    call_.num_fed = num_fed;
    call_.k = k;
    call_.draft_positions = draft_positions;
    if (given_) {
      const auto& [drafts, num_drafts] = *given_;
      call_.given = matrix<const int32_t>(drafts, "given", count, k);
      call_.num_given = {
          dense_input(num_drafts, "num_given", at::kInt, {count}).data_ptr<int32_t>(),
          static_cast<size_t>(count)};
    }
  }

  PyRound(const PyRound&) = delete;
  PyRound& operator=(const PyRound&) = delete;

  // Rounds, one after the other, until so many are done, `max_seconds` are over, or a sequence has
  // ended (`has_ended`). Of each the rows of its record, the emitted tokens alone behind the
  // columns, and the seconds that drafts, verification and commit took.
  py::list run(int64_t max_rounds, double max_seconds, const std::vector<int32_t>& stop_ids) {
    const auto count = static_cast<int64_t>(call_.slots.size());
    rounds_.clear();
    emitted_.clear();
    {
      const ReleaseGil released;
      const ThreadsInUse in_use(*threads_);
      double seconds = 0.0;
      do {
        record_ = memory_.run(call_);
        rounds_.push_back({record_.draft_seconds, record_.verify_seconds, record_.commit_seconds});
        for (int64_t b = 0; b < count; ++b) {
          const int32_t* row = record_.rows + b * record_.width;
          emitted_.insert(emitted_.end(), row, row + kNumResultColumns + row[kResultEmitted]);
        }
        seconds += std::accumulate(rounds_.back().begin(), rounds_.back().end(), 0.0);
      } while (std::ssize(rounds_) < max_rounds && seconds < max_seconds &&
               !has_ended(call_, record_, stop_ids));
    }
    py::list results(rounds_.size());
    const int32_t* row = emitted_.data();
    for (size_t i = 0; i < rounds_.size(); ++i) {
      py::list rows(count);
      for (int64_t b = 0; b < count; ++b) {
        const int64_t width = kNumResultColumns + row[kResultEmitted];
        rows[b] = numbers(row, width);
        row += width;
      }
      const auto& [draft, verify, commit] = rounds_[i];
      results[i] = py::make_tuple(rows, py::make_tuple(draft, verify, commit));
    }
    return results;
  }

  // What the latest run judged of each sequence, and then anything.
  py::list drafts() const {
    const Matrix<const int32_t>& drafts = record_.drafts;
    py::list rows(drafts.num_rows);
    for (int64_t b = 0; b < drafts.num_rows; ++b) rows[b] = numbers(drafts[b], drafts.width);
    return rows;
  }

 private:
  static void check_rows(const RowTensors& rows, int64_t count) {
    for (const Tensor& column : rows) {
      check_contiguous(column, "rows");
      check_shape(column, "rows", column.scalar_type(), {count});
    }
  }

  static py::list numbers(const int32_t* values, int64_t count) {
    py::list list(count);
    for (int64_t i = 0; i < count; ++i) list[i] = py::int_(values[i]);
    return list;
  }

  // Tensors are kept because the call points into them.
  std::shared_ptr<Threads> threads_;
  std::vector<Tensor> caches_;
  StateTensors state_;
  Tensor slots_;
  RowTensors rows_;
  std::optional<TransformTensors> transforms_;
  std::optional<GivenTensors> given_;
  std::optional<RoundModel> draft_;
  std::optional<TransformTables> tables_;
  RoundCall call_{};
  RoundMemory memory_;
  RoundRecord record_{};
  // Of the latest run: seconds of each round's parts, and their rows.
  std::vector<std::array<double, 3>> rounds_;
  std::vector<int32_t> emitted_;
};

}  // namespace specengine
