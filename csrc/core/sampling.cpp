#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
// Logits below which a region costs more than it saves.
constexpr int64_t kMinParallelLogits = 8192;
// Candidates that are sorted outright rather than binned.
constexpr int64_t kMaxSortedCandidates = 4096;

float divisor_of(float temperature) { return temperature > 0.0f ? temperature : 1.0f; }

RowView unfiltered(const float* logits, int64_t vocab, float temperature) {
  return {logits, vocab, divisor_of(temperature), kNegativeInfinity, 0.0f};
}

RowView filtered(const float* logits, int64_t vocab, float temperature, const float* stats) {
  return {logits, vocab, divisor_of(temperature), stats[kStatThreshold], stats[kStatLogNormaliser]};
}

Scratch<float>& share_scratch() {
  static thread_local Scratch<float> scratch;
  return scratch;
}

Scratch<float>& candidate_scratch() {
  static thread_local Scratch<float> scratch;
  return scratch;
}

// Values are in descending order; returns the smallest kept one, walking whole groups of equal
// values until `wanted` mass (in units of exp(value - maximum)) is reached. `mass` is what lies
// above.
float nucleus_end(const float* values, int64_t count, float maximum, double mass, double wanted) {
  float threshold = values[0];
  for (int64_t i = 0; i < count && mass < wanted;) {
    threshold = values[i];
    const double each = std::exp(static_cast<double>(threshold) - maximum);
    for (; i < count && values[i] == threshold; ++i) mass += each;
  }
  return threshold;
}

// The k-th largest scaled value. Where k is small, the k-th largest of 512 disjoint groups' maxima
// bounds it from below, and only what reaches that bound is looked at again. Leaves every value >=
// the result in `values`, their number in `num_candidates`.
float kth_largest(const RowView& row, int64_t k, float* values, int64_t& num_candidates) {
  const Kernels& isa = kernels();
  float bound = kNegativeInfinity;
  if (k <= kNumMaximaGroups / 2 && row.vocab > 2 * kNumMaximaGroups) {
    alignas(64) float group_maxima[kNumMaximaGroups];
    isa.row_group_maxima(row, group_maxima);
    std::nth_element(group_maxima, group_maxima + k - 1, group_maxima + kNumMaximaGroups,
                     std::greater<>());
    bound = group_maxima[k - 1];
  }
  num_candidates = isa.row_collect(row, bound, values);
  if (num_candidates < k) return kNegativeInfinity;
  std::nth_element(values, values + k - 1, values + num_candidates, std::greater<>());
  return values[k - 1];
}

// Top-p by bins of mass: only the bin in which the cumulative mass crosses top_p is sorted.
float nucleus_by_bins(const RowView& row, float maximum, double top_p, float* values) {
  const Kernels& isa = kernels();
  alignas(64) double mass[kNumMassBins];
  isa.row_mass_bins(row, maximum, mass);
  double total = 0.0;
  for (double bin : mass) total += bin;
  const double wanted = top_p * total;
  double above = 0.0;
  int bin = 0;
  while (bin + 1 < kNumMassBins && above + mass[bin] < wanted) above += mass[bin++];
  int64_t count = 0;
  // Rounding may leave an empty bin as the crossing one: its upper neighbour then holds the end.
  while ((count = isa.row_collect_bin(row, maximum, bin, values)) == 0) above -= mass[--bin];
  std::sort(values, values + count, std::greater<>());
  return nucleus_end(values, count, maximum, above, wanted);
}

float row_threshold(RowView row, float maximum, int64_t top_k, float top_p, float min_p) {
  float threshold = kNegativeInfinity;
  float* values = candidate_scratch().reserve(row.vocab + 16);
  int64_t num_candidates = row.vocab;
  const bool has_top_k = top_k > 0 && top_k < row.vocab;
  if (has_top_k) threshold = row.threshold = kth_largest(row, top_k, values, num_candidates);
  if (top_p < 1.0f) {
    if (has_top_k && num_candidates <= kMaxSortedCandidates) {
      const auto end = std::partition(values, values + num_candidates,
                                      [&](float value) { return value >= threshold; });
      std::sort(values, end, std::greater<>());
      double total = 0.0;
      for (auto value = values; value != end; ++value)
        total += std::exp(static_cast<double>(*value) - maximum);
      threshold =
          nucleus_end(values, end - values, maximum, 0.0, static_cast<double>(top_p) * total);
    } else {
      threshold = nucleus_by_bins(row, maximum, static_cast<double>(top_p), values);
    }
  }
  if (min_p > 0.0f) {
    const double bound = static_cast<double>(maximum) + std::log(static_cast<double>(min_p));
    threshold = std::max(threshold, static_cast<float>(bound));
  }
  return threshold;
}

void filter_row(const float* logits, int64_t vocab, const SamplingRows& rows, int64_t r,
                float* stats) {
  const Kernels& isa = kernels();
  const bool is_greedy = !(rows.temperature[r] > 0.0f);
  RowView row = unfiltered(logits, vocab, rows.temperature[r]);
  const auto [maximum, has_nan] = isa.row_maximum(row);
  const bool is_bad = has_nan || maximum == kNegativeInfinity;
  if (!is_greedy && !is_bad) {
    row.threshold = row_threshold(row, maximum, rows.top_k[r], rows.top_p[r], rows.min_p[r]);
  }
  stats[kStatMaximum] = maximum;
  stats[kStatThreshold] = row.threshold;
  stats[kStatLogNormaliser] = maximum == kNegativeInfinity
                                  ? kNegativeInfinity
                                  : static_cast<float>(static_cast<double>(maximum) +
                                                       std::log(isa.row_sum_exp(row, maximum)));
  stats[kStatError] = is_bad ? 1.0f : 0.0f;
}

// The target's draw at one row: argmax where greedy, else the Gumbel race.
int32_t draw(const RowView& row, bool is_greedy, const NoiseKey& key) {
  const Kernels& isa = kernels();
  return is_greedy ? isa.row_argmax(row) : isa.race(row, nullptr, -1, key).token;
}

float scaled_at(const RowView& row, int64_t token) {
  return kernels()
      .row_maximum({row.logits + token, 1, row.divisor, row.threshold, row.log_normaliser})
      .value;
}

// log p(token) under the filtered law; -inf outside the support or the row.
float filtered_log_prob(const RowView& row, bool is_greedy, int64_t token) {
  if (token < 0 || token >= row.vocab) return kNegativeInfinity;
  if (is_greedy) return kernels().row_argmax(row) == token ? 0.0f : kNegativeInfinity;
  const float scaled = scaled_at(row, token);
  return scaled < row.threshold ? kNegativeInfinity : scaled - row.log_normaliser;
}

// One sequence of a verification.
struct Sequence {
  const VerifyCall& call;
  int64_t b;

  float temperature() const { return call.rows.temperature[b]; }
  bool is_greedy() const { return !(temperature() > 0.0f); }
  uint64_t seed() const { return static_cast<uint64_t>(call.rows.seeds[b]); }
  uint32_t seq_len() const { return static_cast<uint32_t>(call.drafts.seq_len[b]); }
  int64_t num_draft() const { return call.drafts.num_draft[b]; }
  int32_t draft_token(int64_t i) const { return call.drafts.tokens[b][i]; }
  const float* stats(int64_t i) const {
    return call.stats + (call.drafts.row_start[b] + i) * kNumStats;
  }
  RowView row(int64_t i) const {
    return filtered(call.logits.row(call.drafts.row_start[b] + i), call.logits.vocab, temperature(),
                    stats(i));
  }
  NoiseKey target_key(int64_t i) const {
    return {seed(), seq_len() + static_cast<uint32_t>(i), kStreamTarget, 0};
  }

  // log p(x_i) - log q(x_i), q the law that draft i was drawn from.
  float log_ratio(int64_t i) const {
    const Drafts& drafts = call.drafts;
    const float log_p = drafted_log_prob(i);
    return drafts.law.is_of(b) ? log_p - drafts.law.log_probs[b * drafts.tokens.width + i] : log_p;
  }
  // log p(x_i).
  float drafted_log_prob(int64_t i) const {
    return filtered_log_prob(row(i), is_greedy(), draft_token(i));
  }
  // u_i.
  float accept_uniform(int64_t i) const {
    const uint32_t bits = accept_bits(seed(), seq_len() + static_cast<uint32_t>(i), seq_len(), 0);
    return static_cast<float>((bits + 0.5) * 0x1p-32);
  }
  RowView draft_row(int64_t i) const {
    const DraftLaw& law = call.drafts.law;
    return filtered(law.logits + b * law.sequence_stride + i * law.row_stride, law.vocab,
                    temperature(), law.stats + (b * call.drafts.tokens.width + i) * kNumStats);
  }

  void commit(int64_t num_accepted, int32_t next_token) const {
    int32_t* tokens = call.verdict.tokens[b];
    for (int64_t i = 0; i < num_accepted; ++i) tokens[i] = draft_token(i);
    tokens[num_accepted] = next_token;
    call.verdict.num_accepted[b] = static_cast<int32_t>(num_accepted);
    bool is_bad = false;
    for (int64_t i = 0; i <= num_accepted; ++i) is_bad |= stats(i)[kStatError] != 0.0f;
    call.verdict.error[b] = is_bad ? 1 : 0;
  }
};

template <class Judge>
void judge_each(const VerifyCall& call, Rule rule, const Judge& judge) {
  const int64_t count = call.drafts.count();
  parallel_for(count, count * call.logits.vocab >= kMinParallelLogits, [&](int64_t b) {
    if (call.is_judged_by(rule, b)) judge(Sequence{call, b});
  });
}

int64_t count_accepted(const Sequence& sequence) {
  for (int64_t i = 0; i < sequence.num_draft(); ++i) {
    if (!(std::log(sequence.accept_uniform(i)) <= sequence.log_ratio(i))) return i;
  }
  return sequence.num_draft();
}

// What of the prefixes may be kept, log P_i for i = 0 … k.
const float* log_shares(const Sequence& sequence) {
  const int64_t k = sequence.num_draft();
  float* shares = share_scratch().reserve(k + 1);
  shares[0] = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const float share = shares[i] + sequence.log_ratio(i);
    shares[i + 1] = std::isnan(share) ? kNegativeInfinity : std::min(share, 0.0f);
  }
  return shares;
}

// Sum of max(P_i p_i - q_i, 0).
float excess(const Sequence& sequence, int64_t i, float log_share) {
  RowView row = sequence.row(i);
  if (!sequence.call.drafts.law.is_of(sequence.b)) {
    return std::exp(log_share) * -std::expm1(sequence.drafted_log_prob(i));
  }
  row.log_normaliser -= log_share;
  return static_cast<float>(kernels().residual_mass(row, sequence.draft_row(i)));
}

// The longest prefix that passes its test: looked for from the end.
int64_t count_in_block(const Sequence& sequence, const float* log_shares) {
  const int64_t k = sequence.num_draft();
  if (std::log(sequence.accept_uniform(k - 1)) <= log_shares[k]) return k;
  for (int64_t i = k - 1; i > 0; --i) {
    if (log_shares[i] == kNegativeInfinity) continue;
    const float left = excess(sequence, i, log_shares[i]);
    const float lost = 1.0f - std::exp(log_shares[i]);
    if (sequence.accept_uniform(i - 1) * (left + lost) <= left) return i;
  }
  return 0;
}

// The recovered or bonus token: a race on max(P p - q, 0) after a rejection at i < k, else on p.
int32_t draw_next(const Sequence& sequence, int64_t i, float log_share = 0.0f) {
  const Kernels& isa = kernels();
  const RowView row = sequence.row(i);
  const NoiseKey key = sequence.target_key(i);
  if (sequence.is_greedy()) return isa.row_argmax(row);
  if (i < sequence.num_draft()) {
    RaceResult recovered;
    if (sequence.call.drafts.law.is_of(sequence.b)) {
      const RowView law = sequence.draft_row(i);
      RowView shared = row;
      shared.log_normaliser -= log_share;
      recovered = isa.race(shared, &law, -1, key);
    } else {
      recovered = isa.race(row, nullptr, sequence.draft_token(i), key);
    }
    if (recovered.score != kNegativeInfinity) return recovered.token;
  }
  return isa.race(row, nullptr, -1, key).token;
}

// Keeps drafts while they are accepted, and the target's own draw behind them.
template <class Accepts>
void commit_while(const Sequence& sequence, const Accepts& accepts) {
  int64_t i = 0;
  while (i < sequence.num_draft() && accepts(i)) ++i;
  sequence.commit(i, draw(sequence.row(i), sequence.is_greedy(), sequence.target_key(i)));
}

}  // namespace

FilteredDraw draw_filtered(const float* logits, int64_t vocab, const SamplingRows& rows, int64_t r,
                           const NoiseKey& key) {
  const float temperature = rows.temperature[r];
  const bool is_greedy = !(temperature > 0.0f);
  float stats[kNumStats];
  filter_row(logits, vocab, rows, r, stats);
  return {draw(filtered(logits, vocab, temperature, stats), is_greedy, key),
          stats[kStatError] != 0.0f};
}

void filter_rows(const LogitRows& logits, const SamplingRows& rows, float* stats) {
  parallel_for(
      logits.num_rows, logits.num_rows * logits.vocab >= kMinParallelLogits,
      [&](int64_t r) { filter_row(logits.row(r), logits.vocab, rows, r, stats + r * kNumStats); });
}

void sample_rows(const LogitRows& logits, const float* stats, const SamplingRows& rows,
                 const int32_t* positions, uint32_t stream, const int32_t* round_base,
                 int32_t* tokens, float* log_probs) {
  parallel_for(
      logits.num_rows, logits.num_rows * logits.vocab >= kMinParallelLogits, [&](int64_t r) {
        const float temperature = rows.temperature[r];
        const RowView row =
            filtered(logits.row(r), logits.vocab, temperature, stats + r * kNumStats);
        const bool is_greedy = !(temperature > 0.0f);
        tokens[r] = draw(row, is_greedy,
                         {static_cast<uint64_t>(rows.seeds[r]), static_cast<uint32_t>(positions[r]),
                          stream, static_cast<uint32_t>(round_base[r])});
        log_probs[r] = is_greedy ? 0.0f : scaled_at(row, tokens[r]) - row.log_normaliser;
      });
}

void check_verify(const VerifyCall& call, Rule rule) {
  const Drafts& drafts = call.drafts;
  for (int64_t b = 0; b < drafts.count(); ++b) {
    if (!call.is_judged_by(rule, b)) continue;
    const int64_t k = drafts.num_draft[b], start = drafts.row_start[b];
    if (k < 0 || k > drafts.tokens.width) {
      fail("num_draft: ", k, " at index ", b, " is outside 0 … ", drafts.tokens.width,
           ", the columns of draft_tokens");
    }
    if (start < 0 || start + k >= call.logits.num_rows) {
      fail("row_start: rows ", start, " … ", start + k, " at index ", b, " are outside the ",
           call.logits.num_rows, " rows of logits");
    }
  }
}

void match_verify(const VerifyCall& call) {
  judge_each(call, kRuleMatch, [](const Sequence& sequence) {
    int64_t i = 0;
    int32_t drawn = draw(sequence.row(0), sequence.is_greedy(), sequence.target_key(0));
    while (i < sequence.num_draft() && drawn == sequence.draft_token(i)) {
      ++i;
      drawn = draw(sequence.row(i), sequence.is_greedy(), sequence.target_key(i));
    }
    sequence.commit(i, drawn);
  });
}

void rejection_verify(const VerifyCall& call) {
  judge_each(call, kRuleRejection, [](const Sequence& sequence) {
    const int64_t num_accepted = count_accepted(sequence);
    sequence.commit(num_accepted, draw_next(sequence, num_accepted));
  });
}

void block_verify(const VerifyCall& call) {
  judge_each(call, kRuleBlock, [](const Sequence& sequence) {
    const float* shares = log_shares(sequence);
    const int64_t num_accepted = count_in_block(sequence, shares);
    sequence.commit(num_accepted, draw_next(sequence, num_accepted, shares[num_accepted]));
  });
}

void threshold_verify(const VerifyCall& call) {
  judge_each(call, kRuleThreshold, [](const Sequence& sequence) {
    const float bound = std::log(sequence.call.rows.acceptance_threshold[sequence.b]);
    commit_while(sequence, [&](int64_t i) { return sequence.drafted_log_prob(i) > bound; });
  });
}

void typical_verify(const VerifyCall& call) {
  judge_each(call, kRuleTypical, [](const Sequence& sequence) {
    const float bound = std::log(sequence.call.rows.acceptance_threshold[sequence.b]);
    const float log_delta = std::log(sequence.call.rows.acceptance_delta[sequence.b]);
    commit_while(sequence, [&](int64_t i) {
      const float log_p = sequence.drafted_log_prob(i);
      if (log_p > bound || log_p == kNegativeInfinity) return log_p > bound;
      return log_p > log_delta - static_cast<float>(kernels().row_entropy(sequence.row(i)));
    });
  });
}

}  // namespace specengine
