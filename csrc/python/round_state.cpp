// The bookkeeping of a speculative round on numbers that rounds hand on: what is fed, staged,
// matched and committed. Shapes and meaning are those of specengine.kernels.reference. Every number
// that indexes memory is checked before anything is written.
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "core/philox.h"
#include "python/gil.h"
#include "python/tensor_checks.h"
#include "python/threads.h"

namespace specengine {
namespace {

// Floats below which threads cost more than they save.
constexpr int64_t kMinParallelFloats = 65536;
// Columns of commit_round's record before the emitted tokens.
enum ResultColumn { kResultEmitted, kResultDrafted, kResultError, kNumResultColumns };

// Without a trip through PyTorch's dispatcher, which costs as much as the op itself.
Tensor empty_ints(at::IntArrayRef shape) { return Tensor(at::detail::empty_cpu(shape, at::kInt)); }

// A checked input of int32, kept alive.
struct Ints {
  Tensor tensor;
  const int32_t* data;

  Ints(const Tensor& given, const char* name, int64_t count)
      : tensor(small_input(given, name, at::kInt, {count})), data(tensor.data_ptr<int32_t>()) {}
  int32_t operator[](int64_t index) const { return data[index]; }
  int64_t size() const { return tensor.size(0); }
};

int32_t* int_output(const Tensor& tensor, const char* name, int64_t count) {
  return dense_input(tensor, name, at::kInt, {count}).data_ptr<int32_t>();
}

// A matrix that is used where it lies.
template <class T>
struct Rows {
  T* data;
  int64_t stride, width;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rows_of(const Tensor& tensor, const char* name, at::ScalarType dtype, int64_t num_rows,
                int64_t width) {
  check_shape(tensor, name, dtype, {num_rows, width});
  if (tensor.size(1) > 1 && tensor.stride(1) != 1)
    fail(name, ": expected rows with stride 1, got strides ", tensor.strides());
  return {tensor.data_ptr<T>(), tensor.stride(0), tensor.size(1)};
}

Rows<int32_t> int_rows(const Tensor& tensor, const char* name, int64_t num_rows, int64_t width) {
  return rows_of<int32_t>(tensor, name, at::kInt, num_rows, width);
}

void check_index(int64_t value, int64_t end, const char* name, int64_t b) {
  if (value < 0 || value >= end)
    fail(name, ": ", value, " at index ", b, " is outside 0 … ", end - 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plan_round(
    const Tensor& slots, const Tensor& seq_len, const Tensor& length_limit,
    const Tensor& num_speculative, int64_t k, int64_t draft_positions) {
  const Ints slot(slots, "slots", -1), lengths(seq_len, "seq_len", -1);
  const Ints limits(length_limit, "length_limit", lengths.size());
  const Ints asked(num_speculative, "num_speculative", lengths.size());
  const int64_t count = slot.size();
  check_range(slot.data, count, "slots", 0, lengths.size());
  if (k < 0 || k > INT32_MAX) fail("k: ", k, " is outside 0 … 2^31 - 1");
  const int64_t num_positions = std::clamp<int64_t>(draft_positions, -1, INT32_MAX);
  Tensor length = empty_ints({count}), is_running = empty_ints({count});
  Tensor num_draft = empty_ints({count}), last_position = empty_ints({count});
  Tensor draft_start = empty_ints({k, count}), draft_q_len = empty_ints({k, count});
  Tensor is_drafting = empty_ints({k, count});
  auto* starts = draft_start.data_ptr<int32_t>();
  auto* q_lens = draft_q_len.data_ptr<int32_t>();
  auto* drafting = is_drafting.data_ptr<int32_t>();
  for (int64_t b = 0; b < count; ++b) {
    const int64_t now = lengths[slot[b]], limit = limits[slot[b]];
    const int64_t room = std::min(limit - now - 1, num_positions - now + 1);
    const int64_t wanted = std::min({int64_t{asked[slot[b]]}, room, k});
    const int64_t drafts = now < limit ? std::max<int64_t>(wanted, 0) : 0;
    length.data_ptr<int32_t>()[b] = static_cast<int32_t>(now);
    is_running.data_ptr<int32_t>()[b] = now < limit;
    num_draft.data_ptr<int32_t>()[b] = static_cast<int32_t>(drafts);
    last_position.data_ptr<int32_t>()[b] = static_cast<int32_t>(now - 1);
    for (int64_t step = 0; step < k; ++step) {
      const int64_t at = step * count + b;
      starts[at] = static_cast<int32_t>(now + (step == 0 ? -2 : step - 1));
      drafting[at] = step < drafts;
      q_lens[at] = drafting[at] * (step == 0 ? 2 : 1);
    }
  }
  return {length, is_running, num_draft, last_position, draft_start, draft_q_len, is_drafting};
}

// Copies rows of floats into column `step` of a [B, k, ...] tensor.
struct KeptRows {
  const float* source;
  int64_t source_stride;
  float* target;
  int64_t target_stride, width;

  void copy(int64_t row, int64_t b) const {
    std::memcpy(target + b * target_stride, source + row * source_stride, width * sizeof(float));
  }
};

void stage_draft(int64_t step, const Tensor& tokens, const Tensor& slots, const Tensor& seq_len,
                 const Tensor& is_drafting, const Tensor& drawn,
                 const std::optional<Tensor>& drawn_error, const Tensor& draft_tokens,
                 const Tensor& num_draft, const std::optional<Tensor>& log_probs,
                 const std::optional<Tensor>& logits, const std::optional<Tensor>& stats,
                 const std::optional<Tensor>& draft_log_probs,
                 const std::optional<Tensor>& draft_logits,
                 const std::optional<Tensor>& draft_stats) {
  const Rows<int32_t> history = int_rows(tokens, "tokens", -1, -1);
  const Ints slot(slots, "slots", -1);
  const int64_t count = slot.size();
  const Ints lengths(seq_len, "seq_len", count), drafting(is_drafting, "is_drafting", count);
  const Ints draws(drawn, "drawn", -1);
  const int64_t num_rows = draws.size();
  const Rows<int32_t> drafts = int_rows(draft_tokens, "draft_tokens", count, -1);
  const int64_t k = drafts.width;
  int32_t* num_drafts = int_output(num_draft, "num_draft", count);
  if (step < 0 || step >= k) fail("step: ", step, " is outside 0 … ", k - 1);

  std::vector<KeptRows> kept;
  if (log_probs && draft_log_probs) {
    check_shape(*log_probs, "log_probs", at::kFloat, {num_rows});
    check_shape(*draft_log_probs, "draft_log_probs", at::kFloat, {count, k});
    kept.push_back({log_probs->data_ptr<float>(), log_probs->stride(0),
                    draft_log_probs->data_ptr<float>() + step * draft_log_probs->stride(1),
                    draft_log_probs->stride(0), 1});
  }
  const auto keep = [&](const Tensor& source, const char* source_name, int64_t width,
                        const Tensor& target, const char* target_name) {
    const Rows<float> from = rows_of<float>(source, source_name, at::kFloat, num_rows, width);
    check_shape(target, target_name, at::kFloat, {count, k, from.width});
    if (from.width > 1 && target.stride(2) != 1)
      fail(target_name, ": expected rows with stride 1, got strides ", target.strides());
    kept.push_back({from.data, from.stride, target.data_ptr<float>() + step * target.stride(1),
                    target.stride(0), from.width});
  };
  if (logits && draft_logits) keep(*logits, "logits", -1, *draft_logits, "draft_logits");
  if (stats && draft_stats) keep(*stats, "stats", kNumStats, *draft_stats, "draft_stats");
  std::optional<Ints> errors;
  Rows<float> statistics{};
  if (stats) {
    statistics = rows_of<float>(*stats, "stats", at::kFloat, num_rows, kNumStats);
  } else if (drawn_error) {
    errors.emplace(*drawn_error, "drawn_error", num_rows);
  } else {
    fail("drawn_error: give drawn_error or stats");
  }

  int64_t num_chosen = 0, num_floats = 0;
  for (int64_t b = 0; b < count; ++b) {
    if (!drafting[b]) continue;
    check_index(slot[b], tokens.size(0), "slots", b);
    check_index(int64_t{lengths[b]} + step, history.width, "seq_len + step", b);
    ++num_chosen;
  }
  if (num_chosen > num_rows)
    fail("drawn: ", num_rows, " rows for ", num_chosen, " drafting sequences");
  for (const KeptRows& rows : kept) num_floats += rows.width * num_chosen;

  std::vector<int64_t> chosen;
  chosen.reserve(num_chosen);
  for (int64_t b = 0; b < count; ++b) {
    if (!drafting[b]) continue;
    const int64_t row = static_cast<int64_t>(chosen.size());
    chosen.push_back(b);
    history[slot[b]][lengths[b] + step] = drafts[b][step] = draws[row];
    const bool is_bad = errors ? (*errors)[row] != 0 : statistics[row][kStatError] != 0.0f;
    if (is_bad) num_drafts[b] = std::min(num_drafts[b], static_cast<int32_t>(step));
  }
  if (kept.empty()) return;
  const ReleaseGil released;
  parallel_for(num_chosen, num_floats >= kMinParallelFloats, [&](int64_t row) {
    for (const KeptRows& rows : kept) rows.copy(row, chosen[row]);
  });
}

void match_draws(const Tensor& drawn, const Tensor& drawn_error, const Tensor& row_start,
                 const Tensor& num_draft, const Tensor& draft_tokens, const Tensor& is_running,
                 const Tensor& tokens, const Tensor& num_accepted, const Tensor& error,
                 std::optional<double> forced_acceptance, const std::optional<Tensor>& seeds,
                 const std::optional<Tensor>& seq_len) {
  const Ints draws(drawn, "drawn", -1);
  const int64_t num_rows = draws.size();
  const Ints errors(drawn_error, "drawn_error", num_rows), starts(row_start, "row_start", -1);
  const int64_t count = starts.size();
  const Ints num_drafts(num_draft, "num_draft", count), running(is_running, "is_running", count);
  const Rows<int32_t> drafts = int_rows(draft_tokens, "draft_tokens", count, -1);
  const Rows<int32_t> emitted = int_rows(tokens, "tokens", count, drafts.width + 1);
  int32_t* accepted = int_output(num_accepted, "num_accepted", count);
  int32_t* failed = int_output(error, "error", count);
  Tensor keys;
  std::optional<Ints> lengths;
  if (forced_acceptance) {
    if (!seeds) fail("seeds: forced_acceptance draws by seeds and seq_len");
    if (!seq_len) fail("seq_len: forced_acceptance draws by seeds and seq_len");
    keys = small_input(*seeds, "seeds", at::kLong, {count});
    lengths.emplace(*seq_len, "seq_len", count);
  }
  for (int64_t b = 0; b < count; ++b) {
    if (!running[b]) continue;
    check_index(num_drafts[b], drafts.width + 1, "num_draft", b);
    check_index(starts[b], num_rows, "row_start", b);
    check_index(int64_t{starts[b]} + num_drafts[b], num_rows, "row_start + num_draft", b);
  }
  const auto is_kept = [&](int64_t b, int32_t i) {
    if (!forced_acceptance) return draws[starts[b] + i] == drafts[b][i];
    const auto base = static_cast<uint32_t>((*lengths)[b]);
    const auto seed = static_cast<uint64_t>(keys.data_ptr<int64_t>()[b]);
    const uint32_t bits = accept_bits(seed, base + static_cast<uint32_t>(i), base, 0);
    const auto uniform = static_cast<float>((bits + 0.5) * 0x1p-32);
    return uniform < static_cast<float>(*forced_acceptance);
  };
  for (int64_t b = 0; b < count; ++b) {
    if (!running[b]) continue;
    int32_t n = 0;
    bool is_bad = errors[starts[b]] != 0;
    while (n < num_drafts[b] && is_kept(b, n)) {
      emitted[b][n] = drafts[b][n];
      ++n;
      is_bad |= errors[starts[b] + n] != 0;
    }
    emitted[b][n] = draws[starts[b] + n];
    accepted[b] = n;
    failed[b] = is_bad;
  }
}

Tensor commit_round(const Tensor& tokens, const Tensor& seq_len, const Tensor& length_limit,
                    const Tensor& slots, const Tensor& start, const Tensor& is_running,
                    const Tensor& emitted, const Tensor& num_accepted, const Tensor& num_draft,
                    const Tensor& error) {
  const Rows<int32_t> history = int_rows(tokens, "tokens", -1, -1);
  const int64_t num_slots = tokens.size(0);
  int32_t* lengths = int_output(seq_len, "seq_len", num_slots);
  int32_t* limits = int_output(length_limit, "length_limit", num_slots);
  const Ints slot(slots, "slots", -1);
  const int64_t count = slot.size();
  const Ints starts(start, "start", count), running(is_running, "is_running", count);
  const Rows<int32_t> fresh = int_rows(emitted, "emitted", count, -1);
  const Ints accepted(num_accepted, "num_accepted", count);
  const Ints drafted(num_draft, "num_draft", count), failed(error, "error", count);
  for (int64_t b = 0; b < count; ++b) {
    if (!running[b]) continue;
    check_index(slot[b], num_slots, "slots", b);
    if (failed[b]) continue;
    check_index(accepted[b], fresh.width, "num_accepted", b);
    check_index(starts[b], history.width, "start", b);
    check_index(int64_t{starts[b]} + accepted[b], history.width, "start + num_accepted", b);
  }
  Tensor record = empty_ints({count, kNumResultColumns + fresh.width});
  auto* result = record.data_ptr<int32_t>();
  for (int64_t b = 0; b < count; ++b, result += kNumResultColumns + fresh.width) {
    const bool is_error = running[b] && failed[b];
    const int32_t num_emitted = running[b] && !failed[b] ? accepted[b] + 1 : 0;
    result[kResultEmitted] = num_emitted;
    result[kResultDrafted] = running[b] ? drafted[b] : 0;
    result[kResultError] = is_error;
    std::copy_n(fresh[b], fresh.width, result + kNumResultColumns);
    if (is_error) limits[slot[b]] = 0;
    if (num_emitted == 0) continue;
    std::copy_n(fresh[b], num_emitted, history[slot[b]] + starts[b]);
    lengths[slot[b]] = starts[b] + num_emitted;
  }
  return record;
}

}  // namespace
}  // namespace specengine

void bind_round_state(pybind11::module_& m, specengine::OpsClass& ops) {
  using pybind11::arg;
  const auto none = pybind11::none();
  m.def("plan_round", &specengine::plan_round);
  ops.def("stage_draft", specengine::on_threads(&specengine::stage_draft), arg("step"),
          arg("tokens"), arg("slots"), arg("seq_len"), arg("is_drafting"), arg("drawn"),
          arg("drawn_error"), arg("draft_tokens"), arg("num_draft"), arg("log_probs") = none,
          arg("logits") = none, arg("stats") = none, arg("draft_log_probs") = none,
          arg("draft_logits") = none, arg("draft_stats") = none);
  m.def("match_draws", &specengine::match_draws, arg("drawn"), arg("drawn_error"), arg("row_start"),
        arg("num_draft"), arg("draft_tokens"), arg("is_running"), arg("tokens"),
        arg("num_accepted"), arg("error"), arg("forced_acceptance") = none, arg("seeds") = none,
        arg("seq_len") = none);
  m.def("commit_round", &specengine::commit_round);
}
