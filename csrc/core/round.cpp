#include "core/round.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace specengine {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

Matrix<const int32_t> read_only(const Matrix<int32_t>& matrix) {
  return {matrix.data, matrix.num_rows, matrix.width, matrix.stride};
}

int64_t num_sequences(const RoundCall& call) { return static_cast<int64_t>(call.slots.size()); }

Ints one_each(const RoundCall& call, const int32_t* values) { return {values, call.slots.size()}; }

}  // namespace

RoundPlan RoundMemory::plan(const RoundCall& call) {
  const int64_t count = num_sequences(call);
  int32_t* at = plan_.reserve(count * (4 + 3 * call.k));
  const auto take = [&](int64_t size) { return std::exchange(at, at + size); };
  const RoundPlan plan{take(count),          take(count),          take(count),         take(count),
                       take(call.k * count), take(call.k * count), take(call.k * count)};
  const auto num_slots = static_cast<size_t>(call.tokens.num_rows);
  plan_round(call.slots, {call.seq_len, num_slots}, {call.length_limit, num_slots},
             call.num_speculative, call.k, call.draft_positions, plan);
  return plan;
}

// Drafts end before the first draw whose distribution was none.
RoundMemory::Drafted RoundMemory::draft(const RoundCall& call, const RoundPlan& plan) {
  const int64_t count = num_sequences(call);
  const int64_t k = *std::max_element(plan.num_draft, plan.num_draft + count);
  int32_t* tokens = drafts_.reserve(2 * count * k);
  int32_t* error = tokens + count * k;
  std::fill_n(tokens, 2 * count * k, 0);
  const RoundModel& model = *call.draft;
  const int32_t* start = call.num_fed == 1 ? plan.last_position : plan.draft_start;
  model.runner->draft({call.tokens, call.block_table, call.slots, one_each(call, start),
                       one_each(call, plan.length), one_each(call, plan.num_draft), model.kv_cache,
                       model.kv_dtype, model.num_blocks, model.block_size, tokens, error, k},
                      model.vocab_size, call.rows, call.transforms);
  for (int64_t b = 0; b < count; ++b) {
    const int32_t* errors = error + b * k;
    const auto usable = std::find_if(errors, errors + k, [](int32_t e) { return e != 0; }) - errors;
    plan.num_draft[b] = std::min(plan.num_draft[b], static_cast<int32_t>(usable));
  }
  return {{tokens, count, k, k}, plan.num_draft};
}

// Stages what was given behind the committed tokens, where the forward reads it.
RoundMemory::Drafted RoundMemory::take_given(const RoundCall& call, const RoundPlan& plan) {
  const int64_t width = call.given.width;
  for (int64_t b = 0; b < num_sequences(call); ++b) {
    const int32_t n = plan.num_draft[b] = std::min(plan.num_draft[b], call.num_given[b]);
    if (n == 0) continue;
    check_index(n, 0, width + 1, "num_given", b);
    check_index(int64_t{plan.length[b]} + n - 1, 0, call.tokens.width, "seq_len + num_given", b);
    std::copy_n(call.given[b], n, call.tokens[call.slots[b]] + plan.length[b]);
  }
  return {call.given, plan.num_draft};
}

RoundRecord RoundMemory::run(const RoundCall& call) {
  const int64_t count = num_sequences(call);
  if (count == 0) fail("slots: a round of nobody");
  const Clock::time_point began = Clock::now();
  const RoundPlan plan = this->plan(call);
  const Drafted drafted = call.k == 0             ? Drafted{{nullptr, count, 0, 0}, plan.num_draft}
                          : call.draft != nullptr ? draft(call, plan)
                                                  : take_given(call, plan);
  const Clock::time_point drafted_at = Clock::now();

  const int64_t k = drafted.tokens.width;
  int32_t* q_len = judged_.reserve(count * (k + 4));
  int32_t *num_accepted = q_len + count, *error = num_accepted + count, *emitted = error + count;
  for (int64_t b = 0; b < count; ++b) q_len[b] = drafted.count[b] + plan.is_running[b];
  const Ints fed = one_each(call, q_len);
  const RoundModel& model = call.target;
  const BatchRequest request{read_only(call.tokens),
                             call.block_table,
                             call.slots,
                             one_each(call, plan.last_position),
                             fed,
                             fed,
                             model.block_size};
  const BatchSize size = measure_batch(request);
  const BatchArrays batch = batch_.reserve(size, count);
  expand_batch(request, batch);
  const int64_t num_rows = size.num_logit_rows;
  int32_t* drawn = drawn_.reserve(2 * num_rows);
  model.runner->draw(
      {size.num_tokens, count, batch.token_ids, batch.positions, batch.kv_slots, batch.q_start,
       batch.context_len, call.slots.data(), call.block_table, batch.logit_rows, num_rows,
       model.kv_cache, model.kv_dtype, model.num_blocks, model.block_size},
      model.vocab_size, call.rows, call.transforms, drawn, drawn + num_rows);
  const Drafts drafts{one_each(call, batch.q_start),
                      one_each(call, plan.length),
                      one_each(call, drafted.count),
                      drafted.tokens,
                      {}};
  const auto draws = static_cast<size_t>(num_rows);
  match_draws({{drawn, draws},
               {drawn + num_rows, draws},
               drafts,
               call.rows,
               one_each(call, plan.is_running),
               call.forced_acceptance,
               {{emitted, count, k + 1, k + 1}, num_accepted, error}});
  const Clock::time_point verified_at = Clock::now();

  const int64_t width = kNumResultColumns + k + 1;
  int32_t* record = record_.reserve(count * width);
  commit_round({call.tokens,
                call.seq_len,
                call.length_limit,
                call.slots,
                one_each(call, plan.length),
                one_each(call, plan.is_running),
                one_each(call, num_accepted),
                one_each(call, drafted.count),
                one_each(call, error),
                {emitted, count, k + 1, k + 1},
                record});
  return {record,
          drafted.tokens,
          width,
          seconds(began, drafted_at),
          seconds(drafted_at, verified_at),
          seconds(verified_at, Clock::now())};
}

bool has_ended(const RoundCall& call, const RoundRecord& record, Ints stop_ids) {
  for (int64_t b = 0; b < num_sequences(call); ++b) {
    const int32_t* row = record.rows + b * record.width;
    const int32_t slot = call.slots[b];
    if (row[kResultError] || call.seq_len[slot] >= call.length_limit[slot]) return true;
    const int32_t* emitted = row + kNumResultColumns;
    for (const int32_t stop : stop_ids) {
      const int32_t* end = emitted + row[kResultEmitted];
      if (std::find(emitted, end, stop) != end) return true;
    }
  }
  return false;
}

}  // namespace specengine
