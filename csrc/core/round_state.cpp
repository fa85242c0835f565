#include "core/round_state.h"

#include <algorithm>
#include <cstring>

#include "core/ops.h"
#include "core/philox.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// Floats below which threads cost more than they save.
constexpr int64_t kMinParallelFloats = 65536;

// The drafting sequences, whose places are there.
std::vector<int64_t> drafting_sequences(const StageCall& call) {
  const auto count = static_cast<int64_t>(call.slots.size());
  std::vector<int64_t> chosen;
  chosen.reserve(count);
  for (int64_t b = 0; b < count; ++b) {
    if (!call.is_drafting[b]) continue;
    check_index(call.slots[b], 0, call.tokens.num_rows, "slots", b);
    check_index(call.seq_len[b] + call.step, 0, call.tokens.width, "seq_len + step", b);
    chosen.push_back(b);
  }
  if (chosen.size() > call.drawn.size())
    fail("drawn: ", call.drawn.size(), " rows for ", chosen.size(), " drafting sequences");
  return chosen;
}

void check_match(const MatchCall& call) {
  const auto num_rows = static_cast<int64_t>(call.drawn.size());
  const Drafts& drafts = call.drafts;
  for (int64_t b = 0; b < drafts.count(); ++b) {
    if (!call.is_running[b]) continue;
    check_index(drafts.num_draft[b], 0, drafts.tokens.width + 1, "num_draft", b);
    check_index(drafts.row_start[b], 0, num_rows, "row_start", b);
    check_index(int64_t{drafts.row_start[b]} + drafts.num_draft[b], 0, num_rows,
                "row_start + num_draft", b);
  }
}

bool is_accepted(const MatchCall& call, int64_t b, int32_t i) {
  const Drafts& drafts = call.drafts;
  if (!call.forced_acceptance) return call.drawn[drafts.row_start[b] + i] == drafts.tokens[b][i];
  const auto base = static_cast<uint32_t>(drafts.seq_len[b]);
  const auto seed = static_cast<uint64_t>(call.rows.seeds[b]);
  const uint32_t bits = accept_bits(seed, base + static_cast<uint32_t>(i), base, 0);
  return static_cast<float>((bits + 0.5) * 0x1p-32) < *call.forced_acceptance;
}

void check_commit(const CommitCall& call) {
  for (int64_t b = 0; b < static_cast<int64_t>(call.slots.size()); ++b) {
    if (!call.is_running[b]) continue;
    check_index(call.slots[b], 0, call.tokens.num_rows, "slots", b);
    if (call.error[b]) continue;
    check_index(call.num_accepted[b], 0, call.emitted.width, "num_accepted", b);
    check_index(call.start[b], 0, call.tokens.width, "start", b);
    check_index(int64_t{call.start[b]} + call.num_accepted[b], 0, call.tokens.width,
                "start + num_accepted", b);
  }
}

}  // namespace

void plan_round(Ints slots, Ints seq_len, Ints length_limit, Ints num_speculative, int64_t k,
                int64_t draft_positions, const RoundPlan& plan) {
  const auto count = static_cast<int64_t>(slots.size());
  check_range(slots.data(), count, "slots", 0, static_cast<int64_t>(seq_len.size()));
  const int64_t num_positions = std::clamp<int64_t>(draft_positions, -1, INT32_MAX);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t now = seq_len[slots[b]], limit = length_limit[slots[b]];
    const int64_t room = std::min(limit - now - 1, num_positions - now + 1);
    const int64_t wanted = std::min({int64_t{num_speculative[slots[b]]}, room, k});
    const int64_t drafts = now < limit ? std::max<int64_t>(wanted, 0) : 0;
    plan.length[b] = static_cast<int32_t>(now);
    plan.is_running[b] = now < limit;
    plan.num_draft[b] = static_cast<int32_t>(drafts);
    plan.last_position[b] = static_cast<int32_t>(now - 1);
    for (int64_t step = 0; step < k; ++step) {
      const int64_t at = step * count + b;
      plan.draft_start[at] = static_cast<int32_t>(now + (step == 0 ? -2 : step - 1));
      plan.is_drafting[at] = step < drafts;
      plan.draft_q_len[at] = plan.is_drafting[at] * (step == 0 ? 2 : 1);
    }
  }
}

void stage_draft(const StageCall& call) {
  const std::vector<int64_t> chosen = drafting_sequences(call);
  const auto num_chosen = static_cast<int64_t>(chosen.size());
  for (int64_t row = 0; row < num_chosen; ++row) {
    const int64_t b = chosen[row];
    const int64_t place = call.seq_len[b] + call.step;
    call.tokens[call.slots[b]][place] = call.draft_tokens[b][call.step] = call.drawn[row];
    const bool is_bad = call.drawn_error != nullptr ? call.drawn_error[row] != 0
                                                    : call.stats[row][kStatError] != 0.0f;
    if (is_bad) call.num_draft[b] = std::min(call.num_draft[b], static_cast<int32_t>(call.step));
  }
  int64_t num_floats = 0;
  for (const KeptRows& rows : call.kept) num_floats += rows.width * num_chosen;
  parallel_for(num_chosen, num_floats >= kMinParallelFloats, [&](int64_t row) {
    for (const KeptRows& rows : call.kept) {
      std::memcpy(rows.target + chosen[row] * rows.target_stride,
                  rows.source + row * rows.source_stride, rows.width * sizeof(float));
    }
  });
}

void match_draws(const MatchCall& call) {
  check_match(call);
  const Drafts& drafts = call.drafts;
  for (int64_t b = 0; b < drafts.count(); ++b) {
    if (!call.is_running[b]) continue;
    const int32_t start = drafts.row_start[b];
    int32_t* tokens = call.verdict.tokens[b];
    int32_t n = 0;
    bool is_bad = call.drawn_error[start] != 0;
    while (n < drafts.num_draft[b] && is_accepted(call, b, n)) {
      tokens[n] = drafts.tokens[b][n];
      ++n;
      is_bad |= call.drawn_error[start + n] != 0;
    }
    tokens[n] = call.drawn[start + n];
    call.verdict.num_accepted[b] = n;
    call.verdict.error[b] = is_bad;
  }
}

void commit_round(const CommitCall& call) {
  check_commit(call);
  int32_t* result = call.record;
  for (int64_t b = 0; b < static_cast<int64_t>(call.slots.size()); ++b) {
    const bool is_error = call.is_running[b] && call.error[b];
    const int32_t num_emitted = call.is_running[b] && !is_error ? call.num_accepted[b] + 1 : 0;
    result[kResultEmitted] = num_emitted;
    result[kResultDrafted] = call.is_running[b] ? call.num_draft[b] : 0;
    result[kResultError] = is_error;
    std::copy_n(call.emitted[b], call.emitted.width, result + kNumResultColumns);
    result += kNumResultColumns + call.emitted.width;
    const int32_t slot = call.slots[b];
    if (is_error) call.length_limit[slot] = 0;
    if (num_emitted == 0) continue;
    std::copy_n(call.emitted[b], num_emitted, call.tokens[slot] + call.start[b]);
    call.seq_len[slot] = call.start[b] + num_emitted;
  }
}

}  // namespace specengine
