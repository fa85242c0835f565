// A suffix automaton over a growing text of tokens: where did the text's end occur before, and how
// did it go on there? (Blumer et al. 1985; for drafting: Hu et al. 2024, "SAM Decoding", and Oliaro
// et al. 2024, "SuffixDecoding".)
//
// A state stands for all substrings that end at the same places. Its link leads to the longest
// shorter suffix that ends at more places: the link of the whole text's state is the longest suffix
// that occurred before. Each state knows how often it occurred, how often it was followed, and by
// which token most often (by the latest of those, where several were).
//
// `append` takes amortised constant time: the counts of a text's suffixes are raised for the
// kMaxCounted longest kinds only, so those of shorter ones may be too low in a text like a a a a.
// At max_tokens the older half is forgotten and the rest is read again. Not thread-safe.

#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace specengine {

class SuffixAutomaton {
 public:
  // What all memory of max_tokens tokens is at most, also while a vector grows: 2 states, 3 edges.
  static constexpr int64_t kMaxBytesPerToken = 192;

  struct Draft {
    int64_t match_length;  // of the suffix that was found
    std::vector<int32_t> tokens;
  };

  // max_tokens: 2 … 2^28, else std::invalid_argument.
  explicit SuffixAutomaton(int64_t max_tokens);

  void append(std::span<const int32_t> tokens);

  // What follows the longest suffix of the text that occurred before, or, where `drafted` follows
  // the text, of both that occurs in the text; or, below, the longest suffix of `context` that
  // does. Each token is the one seen most often; as many as the match is long, but at most `limit`,
  // and none that fewer than a tenth of the occurrences led to. A negative token, which separates
  // texts, is never drafted.
  Draft draft(int64_t limit, std::span<const int32_t> drafted = {}) const;
  Draft draft_after(std::span<const int32_t> context, int64_t limit) const;

  int64_t num_seen() const { return num_seen_; }  // tokens appended, the forgotten ones included
  int64_t num_tokens() const { return static_cast<int64_t>(text_.size()); }
  int64_t num_bytes() const;

 private:
  struct State {
    int32_t length;              // of its longest substring
    int32_t link = -1;           // of the root: none
    int32_t count = 0;           // occurrences
    int32_t num_followed = 0;    // occurrences that a token follows
    int32_t first_edge = -1;     // of a list
    int32_t most_frequent = -1;  // edge
  };
  struct Edge {
    int32_t source, token, target;
    int32_t next_of_source, next_in_bucket;
  };

  void clear();
  void forget_older_half();
  void append_one(int32_t token);
  int32_t add_state(const State& state);
  void add_edge(int32_t source, int32_t token, int32_t target);
  int32_t split(int32_t state, int32_t length);
  void count_occurrence(int32_t before, int32_t token);
  int32_t find(int32_t source, int32_t token) const;
  size_t bucket(int32_t source, int32_t token) const;
  struct Match {
    int32_t state;
    int64_t length;
  };
  Match read(Match match, std::span<const int32_t> tokens) const;
  Draft follow(Match match, int64_t limit) const;

  int64_t max_tokens_, num_seen_ = 0;
  std::vector<int32_t> text_;
  std::vector<State> states_;  // the first is the root: the empty suffix
  std::vector<Edge> edges_;
  std::vector<int32_t> buckets_;  // first edge; a power of two of them, at least one an edge
  int32_t last_ = 0;              // the whole text's state
};

}  // namespace specengine
