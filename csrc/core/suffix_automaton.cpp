#include "core/suffix_automaton.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace specengine {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 28;
constexpr int32_t kRoot = 0, kNone = -1;
// Kinds of suffixes whose counts a token raises: ordinary texts have about ten.
constexpr int kMaxCounted = 64;
// A draft that fewer occurrences led to is verified in vain nine times in ten.
constexpr double kMinShare = 0.1;
constexpr size_t kFirstCapacity = 64;

// Room for one more, and never for more than `most`.
template <typename T>
void make_room(std::vector<T>& items, size_t most) {
  if (items.size() < items.capacity()) return;
  items.reserve(std::min(most, std::max(kFirstCapacity, 2 * items.capacity())));
}

}  // namespace

SuffixAutomaton::SuffixAutomaton(int64_t max_tokens) : max_tokens_(max_tokens) {
  if (max_tokens < 2 || max_tokens > kMostTokens) {
    throw std::invalid_argument("max_tokens must be 2 … " + std::to_string(kMostTokens) + ", got " +
                                std::to_string(max_tokens));
  }
  clear();
}

void SuffixAutomaton::append(std::span<const int32_t> tokens) {
  for (const int32_t token : tokens) {
    if (num_tokens() == max_tokens_) forget_older_half();
    append_one(token);
    ++num_seen_;
  }
}

SuffixAutomaton::Draft SuffixAutomaton::draft(int64_t limit,
                                              std::span<const int32_t> drafted) const {
  if (!drafted.empty()) return follow(read({last_, num_tokens()}, drafted), limit);
  const int32_t match = states_[last_].link;
  return match == kNone ? Draft{0, {}} : follow({match, states_[match].length}, limit);
}

SuffixAutomaton::Draft SuffixAutomaton::draft_after(std::span<const int32_t> context,
                                                    int64_t limit) const {
  return follow(read({kRoot, 0}, context), limit);
}

int64_t SuffixAutomaton::num_bytes() const {
  return static_cast<int64_t>(
      sizeof(*this) + text_.capacity() * sizeof(int32_t) + states_.capacity() * sizeof(State) +
      edges_.capacity() * sizeof(Edge) + buckets_.capacity() * sizeof(int32_t));
}

void SuffixAutomaton::clear() {
  text_.clear();
  states_.clear();
  edges_.clear();
  buckets_.assign(std::max(buckets_.size(), kFirstCapacity), kNone);
  last_ = add_state({.length = 0});
}

void SuffixAutomaton::forget_older_half() {
  const std::vector<int32_t> kept(text_.end() - max_tokens_ / 2, text_.end());
  clear();
  for (const int32_t token : kept) append_one(token);
}

void SuffixAutomaton::append_one(int32_t token) {
  make_room(text_, max_tokens_);
  text_.push_back(token);
  const int32_t before = last_;
  last_ = add_state({.length = states_[before].length + 1});

  int32_t source = before, edge = kNone;
  while (source != kNone && (edge = find(source, token)) == kNone) {
    add_edge(source, token, last_);
    source = states_[source].link;
  }
  if (source == kNone) {
    states_[last_].link = kRoot;
  } else {
    const int32_t target = edges_[edge].target, length = states_[source].length + 1;
    const int32_t suffix = states_[target].length == length ? target : split(target, length);
    states_[last_].link = suffix;
    // The shorter sources led to `target` as well, as far as that was split.
    while (suffix != target && source != kNone &&
           edges_[edge = find(source, token)].target == target) {
      edges_[edge].target = suffix;
      source = states_[source].link;
    }
  }
  count_occurrence(before, token);
}

int32_t SuffixAutomaton::add_state(const State& state) {
  make_room(states_, 2 * max_tokens_ + 1);
  states_.push_back(state);
  return static_cast<int32_t>(states_.size() - 1);
}

void SuffixAutomaton::add_edge(int32_t source, int32_t token, int32_t target) {
  make_room(edges_, 3 * max_tokens_ + 1);
  if (edges_.size() == buckets_.size()) {
    buckets_.assign(2 * buckets_.size(), kNone);
    for (size_t index = 0; index < edges_.size(); ++index) {
      int32_t& first = buckets_[bucket(edges_[index].source, edges_[index].token)];
      edges_[index].next_in_bucket = first;
      first = static_cast<int32_t>(index);
    }
  }
  int32_t& first = buckets_[bucket(source, token)];
  edges_.push_back({source, token, target, states_[source].first_edge, first});
  states_[source].first_edge = first = static_cast<int32_t>(edges_.size() - 1);
}

// The state of `state`'s substrings up to `length`, which from now on end at one place more.
int32_t SuffixAutomaton::split(int32_t state, int32_t length) {
  State shorter = states_[state];
  shorter.length = length;
  shorter.first_edge = shorter.most_frequent = kNone;
  const int32_t added = add_state(shorter);
  for (int32_t edge = states_[state].first_edge; edge != kNone;
       edge = edges_[edge].next_of_source) {
    add_edge(added, edges_[edge].token, edges_[edge].target);
    if (edge == states_[state].most_frequent) {
      states_[added].most_frequent = states_[added].first_edge;
    }
  }
  states_[state].link = added;
  return added;
}

// The text's suffixes occurred, and those of the text before were followed by `token`.
void SuffixAutomaton::count_occurrence(int32_t before, int32_t token) {
  int num_left = kMaxCounted;
  for (int32_t state = last_; state > kRoot && num_left-- > 0; state = states_[state].link) {
    ++states_[state].count;
  }
  num_left = kMaxCounted;
  for (int32_t state = before; state > kRoot && num_left-- > 0; state = states_[state].link) {
    State& followed = states_[state];
    ++followed.num_followed;
    const int32_t edge = find(state, token);
    const auto count = [&](int32_t of) { return states_[edges_[of].target].count; };
    if (followed.most_frequent == kNone || count(edge) >= count(followed.most_frequent)) {
      followed.most_frequent = edge;
    }
  }
}

int32_t SuffixAutomaton::find(int32_t source, int32_t token) const {
  int32_t edge = buckets_[bucket(source, token)];
  while (edge != kNone && (edges_[edge].source != source || edges_[edge].token != token)) {
    edge = edges_[edge].next_in_bucket;
  }
  return edge;
}

size_t SuffixAutomaton::bucket(int32_t source, int32_t token) const {
  const uint64_t key =
      static_cast<uint64_t>(static_cast<uint32_t>(source)) << 32 | static_cast<uint32_t>(token);
  // Fibonacci hashing: the product's upper bits depend on all of the key's.
  return (key * 0x9E3779B97F4A7C15u >> 32) & (buckets_.size() - 1);
}

// The longest suffix of the match and the tokens after it that occurs in the text.
SuffixAutomaton::Match SuffixAutomaton::read(Match match, std::span<const int32_t> tokens) const {
  auto [state, length] = match;
  for (const int32_t token : tokens) {
    int32_t edge = find(state, token);
    for (; edge == kNone && state != kRoot; edge = find(state, token)) {
      state = states_[state].link;
      length = states_[state].length;
    }
    if (edge == kNone) continue;
    state = edges_[edge].target;
    ++length;
  }
  return {state, length};
}

SuffixAutomaton::Draft SuffixAutomaton::follow(Match match, int64_t limit) const {
  Draft draft{match.length, {}};
  limit = std::min(limit, match.length);
  int32_t state = match.state;
  double share = 1.0;
  while (static_cast<int64_t>(draft.tokens.size()) < limit) {
    // At the text's end nothing has followed yet, but it did where a suffix of it occurred before.
    while (state > kRoot && states_[state].most_frequent == kNone) state = states_[state].link;
    if (state <= kRoot) break;
    const Edge& edge = edges_[states_[state].most_frequent];
    if (edge.token < 0) break;
    share *= std::min(1.0, static_cast<double>(states_[edge.target].count) /
                               static_cast<double>(states_[state].num_followed));
    if (share < kMinShare) break;
    draft.tokens.push_back(edge.token);
    state = edge.target;
  }
  return draft;
}

}  // namespace specengine
