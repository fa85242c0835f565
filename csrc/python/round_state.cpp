// The round's bookkeeping (core/round_state.h) on tensors.
#include "core/round_state.h"

#include <optional>
#include <tuple>

#include "python/drafts.h"
#include "python/gil.h"
#include "python/rows.h"
#include "python/tensor_checks.h"
#include "python/threads.h"

namespace specengine {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plan_round_op(
    const Tensor& slots, const Tensor& seq_len, const Tensor& length_limit,
    const Tensor& num_speculative, int64_t k, int64_t draft_positions) {
  const IntInput slot(slots, "slots", -1), lengths(seq_len, "seq_len", -1);
  const IntInput limits(length_limit, "length_limit", lengths.size());
  const IntInput asked(num_speculative, "num_speculative", lengths.size());
  if (k < 0 || k > INT32_MAX) fail("k: ", k, " is outside 0 … 2^31 - 1");
  const int64_t count = slot.size();
  const Tensor length = empty_small({count}), is_running = empty_small({count});
  const Tensor num_draft = empty_small({count}), last_position = empty_small({count});
  const Tensor draft_start = empty_small({k, count}), draft_q_len = empty_small({k, count});
  const Tensor is_drafting = empty_small({k, count});
  plan_round(
      slot, lengths, limits, asked, k, draft_positions,
      {length.data_ptr<int32_t>(), is_running.data_ptr<int32_t>(), num_draft.data_ptr<int32_t>(),
       last_position.data_ptr<int32_t>(), draft_start.data_ptr<int32_t>(),
       draft_q_len.data_ptr<int32_t>(), is_drafting.data_ptr<int32_t>()});
  return {length, is_running, num_draft, last_position, draft_start, draft_q_len, is_drafting};
}

void stage_draft_op(int64_t step, const Tensor& tokens, const Tensor& slots, const Tensor& seq_len,
                    const Tensor& is_drafting, const Tensor& drawn,
                    const std::optional<Tensor>& drawn_error, const Tensor& draft_tokens,
                    const Tensor& num_draft, const std::optional<Tensor>& log_probs,
                    const std::optional<Tensor>& logits, const std::optional<Tensor>& stats,
                    const std::optional<Tensor>& draft_log_probs,
                    const std::optional<Tensor>& draft_logits,
                    const std::optional<Tensor>& draft_stats) {
  const Matrix<int32_t> history = matrix<int32_t>(tokens, "tokens", -1, -1);
  const IntInput slot(slots, "slots", -1);
  const int64_t count = slot.size();
  const IntInput lengths(seq_len, "seq_len", count), drafting(is_drafting, "is_drafting", count);
  const IntInput draws(drawn, "drawn", -1);
  const int64_t num_rows = draws.size();
  const Matrix<int32_t> drafts = matrix<int32_t>(draft_tokens, "draft_tokens", count, -1);
  const int64_t k = drafts.width;
  StageCall call{step,  history, slot, lengths, drafting,
                 draws, nullptr, {},   drafts,  int_output(num_draft, "num_draft", count),
                 {}};
  if (step < 0 || step >= k) fail("step: ", step, " is outside 0 … ", k - 1);
  if (log_probs && draft_log_probs) {
    check_shape(*log_probs, "log_probs", at::kFloat, {num_rows});
    check_shape(*draft_log_probs, "draft_log_probs", at::kFloat, {count, k});
    call.kept.push_back({log_probs->data_ptr<float>(), log_probs->stride(0),
                         draft_log_probs->data_ptr<float>() + step * draft_log_probs->stride(1),
                         draft_log_probs->stride(0), 1});
  }
  const auto keep = [&](const Tensor& source, const char* source_name, int64_t width,
                        const Tensor& target, const char* target_name) {
    const Matrix<float> from = matrix<float>(source, source_name, num_rows, width);
    check_shape(target, target_name, at::kFloat, {count, k, from.width});
    if (from.width > 1 && target.stride(2) != 1)
      fail(target_name, ": expected rows with stride 1, got strides ", target.strides());
    call.kept.push_back({from.data, from.stride, target.data_ptr<float>() + step * target.stride(1),
                         target.stride(0), from.width});
  };
  if (logits && draft_logits) keep(*logits, "logits", -1, *draft_logits, "draft_logits");
  if (stats && draft_stats) keep(*stats, "stats", kNumStats, *draft_stats, "draft_stats");
  std::optional<IntInput> errors;
  if (stats) {
    call.stats = matrix<const float>(*stats, "stats", num_rows, kNumStats);
  } else if (drawn_error) {
    call.drawn_error = errors.emplace(*drawn_error, "drawn_error", num_rows).data();
  } else {
    fail("drawn_error: give drawn_error or stats");
  }
  // A handful of numbers is not worth the way to the lock and back.
  std::optional<ReleaseGil> released;
  if (!call.kept.empty()) released.emplace();
  stage_draft(call);
}

void match_draws_op(const Tensor& drawn, const Tensor& drawn_error, const DraftTensors& drafts,
                    const RowTensors& rows, const Tensor& is_running, const VerdictTensors& results,
                    std::optional<float> forced_acceptance) {
  const IntInput draws(drawn, "drawn", -1), errors(drawn_error, "drawn_error", draws.size());
  const DraftInputs judged(drafts);
  const RowInputs judged_by(rows, judged->count());
  const IntInput running(is_running, "is_running", judged->count());
  match_draws(
      {draws, errors, *judged, *judged_by, running, forced_acceptance, verdict(results, *judged)});
}

Tensor commit_round_op(const Tensor& tokens, const Tensor& seq_len, const Tensor& length_limit,
                       const Tensor& slots, const Tensor& start, const Tensor& is_running,
                       const Tensor& emitted, const Tensor& num_accepted, const Tensor& num_draft,
                       const Tensor& error) {
  const Matrix<int32_t> history = matrix<int32_t>(tokens, "tokens", -1, -1);
  int32_t* lengths = int_output(seq_len, "seq_len", history.num_rows);
  int32_t* limits = int_output(length_limit, "length_limit", history.num_rows);
  const IntInput slot(slots, "slots", -1);
  const int64_t count = slot.size();
  const IntInput starts(start, "start", count), running(is_running, "is_running", count);
  const auto fresh = matrix<const int32_t>(emitted, "emitted", count, -1);
  const IntInput accepted(num_accepted, "num_accepted", count);
  const IntInput drafted(num_draft, "num_draft", count), failed(error, "error", count);
  const Tensor record = empty_small({count, kNumResultColumns + fresh.width});
  commit_round({history, lengths, limits, slot, starts, running, accepted, drafted, failed, fresh,
                record.data_ptr<int32_t>()});
  return record;
}

}  // namespace
}  // namespace specengine

void bind_round_state(pybind11::module_& m, specengine::OpsClass& ops) {
  using pybind11::arg;
  const auto none = pybind11::none();
  m.def("plan_round", &specengine::plan_round_op);
  ops.def("stage_draft", specengine::on_threads(&specengine::stage_draft_op), arg("step"),
          arg("tokens"), arg("slots"), arg("seq_len"), arg("is_drafting"), arg("drawn"),
          arg("drawn_error"), arg("draft_tokens"), arg("num_draft"), arg("log_probs") = none,
          arg("logits") = none, arg("stats") = none, arg("draft_log_probs") = none,
          arg("draft_logits") = none, arg("draft_stats") = none);
  m.def("match_draws", &specengine::match_draws_op, arg("drawn"), arg("drawn_error"), arg("drafts"),
        arg("rows"), arg("is_running"), arg("verdict"), arg("forced_acceptance") = none);
  m.def("commit_round", &specengine::commit_round_op);
}
