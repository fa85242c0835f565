// The drafts and verdicts of specengine/kernels/types/drafts.py, named tuples of tensors, as the
// core takes them.
#pragma once

#include <optional>
#include <tuple>

#include "core/drafts.h"
#include "python/tensor_checks.h"

namespace specengine {

using LawTensors = std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>>;
using DraftTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<LawTensors>>;
using VerdictTensors = std::tuple<Tensor, Tensor, Tensor>;

// Drafts without their law, checked and kept alive.
class DraftInputs {
 public:
  explicit DraftInputs(const DraftTensors& tensors)
      : row_start_(std::get<0>(tensors), "row_start", -1),
        seq_len_(std::get<1>(tensors), "seq_len", row_start_.size()),
        num_draft_(std::get<2>(tensors), "num_draft", row_start_.size()),
        tokens_(
            small_input(std::get<3>(tensors), "draft_tokens", at::kInt, {row_start_.size(), -1})),
        drafts_{row_start_,
                seq_len_,
                num_draft_,
                matrix<const int32_t>(tokens_, "draft_tokens", row_start_.size(), -1),
                {}} {}

  const Drafts& operator*() const { return drafts_; }
  const Drafts* operator->() const { return &drafts_; }

  void read_law(const std::optional<LawTensors>& tensors) {
    if (!tensors) return;
    const int64_t count = drafts_.count(), k = drafts_.tokens.width;
    const auto& [log_probs, logits, stats, has_law] = *tensors;
    check_shape(logits, "draft_logits", at::kFloat, {count, k, -1});
    if (logits.size(2) > 1 && logits.stride(2) != 1)
      fail("draft_logits: expected rows with stride 1");
    log_probs_ = small_input(log_probs, "draft_log_probs", at::kFloat, {count, k});
    stats_ = small_input(stats, "draft_stats", at::kFloat, {count, k, kNumStats});
    if (has_law) has_law_ = small_input(*has_law, "has_law", at::kBool, {count});
    drafts_.law = {log_probs_.data_ptr<float>(),
                   logits.data_ptr<float>(),
                   logits.stride(0),
                   logits.stride(1),
                   logits.size(2),
                   stats_.data_ptr<float>(),
                   has_law ? has_law_.data_ptr<bool>() : nullptr};
  }

 private:
  IntInput row_start_, seq_len_, num_draft_;
  Tensor tokens_, log_probs_, stats_, has_law_;
  Drafts drafts_;
};

inline int32_t* int_output(const Tensor& tensor, const char* name, int64_t count) {
  return dense_input(tensor, name, at::kInt, {count}).data_ptr<int32_t>();
}

// Room for a verdict, which is written where it lies.
inline Verdict verdict(const VerdictTensors& tensors, const Drafts& drafts) {
  const auto& [tokens, num_accepted, error] = tensors;
  return {matrix<int32_t>(tokens, "tokens", drafts.count(), drafts.tokens.width + 1),
          int_output(num_accepted, "num_accepted", drafts.count()),
          int_output(error, "error", drafts.count())};
}

}  // namespace specengine
