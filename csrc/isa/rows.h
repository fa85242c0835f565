// Passes over one row of logits. Included inside an instruction set's namespace.
// Values are divided by the temperature and sanitised as they are read: NaN -> -inf, +inf -> 3e38.

constexpr float kLargest = 3e38f;
constexpr float kNegativeInfinity = -__builtin_inff();

inline F16 sanitise(F16 z) {
  const F16 ordered = select(is_nan(z), set1(kNegativeInfinity), z);
  return select(ordered == set1(__builtin_inff()), set1(kLargest), ordered);
}

// Sixteen scaled values from `at` on; -inf beyond the row's end.
inline F16 load_scaled(const RowView& row, int64_t at) {
  const int64_t left = row.vocab - at;
  F16 z = left >= 16 ? load(row.logits + at)
                     : load_first(row.logits + at, static_cast<int>(left), kNegativeInfinity);
  return sanitise(row.divisor == 1.0f ? z : z / set1(row.divisor));
}

// The same with -inf outside the filtered support.
inline F16 load_kept(const RowView& row, int64_t at) {
  const F16 z = load_scaled(row, at);
  return select(z < set1(row.threshold), set1(kNegativeInfinity), z);
}

inline RowMaximum row_maximum(const RowView& row) {
  F16 largest = set1(kNegativeInfinity);
  Mask nans = is_nan(largest);
  for (int64_t at = 0; at < row.vocab; at += 16) {
    const int64_t left = row.vocab - at;
    const F16 z = left >= 16
                      ? load(row.logits + at)
                      : load_first(row.logits + at, static_cast<int>(left), kNegativeInfinity);
    nans = nans | is_nan(z);
    largest = maximum(z, largest);  // keeps `largest` where z is NaN
  }
  float value = reduce_max(largest);
  if (value < 1e30f) {
    value = value /
            row.divisor;  // division is monotone: the maximum's quotient is the quotients' maximum
  } else {
    largest = set1(kNegativeInfinity);
    for (int64_t at = 0; at < row.vocab; at += 16) largest = maximum(load_scaled(row, at), largest);
    value = reduce_max(largest);
  }
  return {value, to_bits(nans) != 0};
}

inline double row_sum_exp(const RowView& row, float maximum_value) {
  D16 sum = zero_d();
  const F16 largest = set1(maximum_value);
  for (int64_t at = 0; at < row.vocab; at += 16) {
    sum = sum + widen(exp(load_kept(row, at) - largest));
  }
  return reduce_add(sum);
}

inline double row_entropy(const RowView& row) {
  D16 sum = zero_d();
  for (int64_t at = 0; at < row.vocab; at += 16) {
    const F16 surprise = set1(row.log_normaliser) - load_kept(row, at);
    // Beyond 100 a probability is 0 in fp32, and so is its share.
    sum = sum + widen(exp(set1(0.0f) - surprise) * minimum(surprise, set1(100.0f)));
  }
  return reduce_add(sum);
}

inline void row_group_maxima(const RowView& row, float* group_maxima) {
  constexpr int kVectors = kNumMaximaGroups / 16;
  for (int i = 0; i < kNumMaximaGroups; i += 16) store(group_maxima + i, set1(kNegativeInfinity));
  for (int64_t at = 0; at < row.vocab; at += 16) {
    float* group = group_maxima + at / 16 % kVectors * 16;
    store(group, maximum(load_scaled(row, at), load(group)));
  }
}

inline int64_t row_collect(const RowView& row, float low, float* values) {
  int64_t count = 0;
  for (int64_t at = 0; at < row.vocab; at += 16) {
    const F16 z = load_scaled(row, at);
    const Mask is_kept = set1(row.threshold) <= z;
    count +=
        compress(values + count, is_kept & (set1(low) <= z) & (set1(kNegativeInfinity) < z), z);
  }
  return count;
}

// Bin 0 is the maximum's; rounding is monotone, so bins are in order of value. -inf goes to the
// last.
inline U16 mass_bin(F16 z, F16 largest) {
  const F16 distance = (largest - z) * set1(kMassBinsPerNat);
  return to_int(minimum(distance, set1(static_cast<float>(kNumMassBins - 1))));
}

inline void row_mass_bins(const RowView& row, float maximum_value, double* mass) {
  for (int i = 0; i < kNumMassBins; ++i) mass[i] = 0.0;
  const F16 largest = set1(maximum_value);
  alignas(64) double masses[16];
  alignas(64) uint32_t bins[16];
  for (int64_t at = 0; at < row.vocab; at += 16) {
    const F16 z = load_kept(row, at);
    // Both exact in double; below -700 nothing counts.
    store(masses, exp(widen(maximum(z, set1(-kLargest))) + widen(set1(0.0f) - largest)));
    store(bins, mass_bin(z, largest));
    const uint32_t live = to_bits(set1(kNegativeInfinity) < z);
    for (int i = 0; i < 16; ++i) {
      if (live >> i & 1) mass[bins[i]] += masses[i];
    }
  }
}

inline int64_t row_collect_bin(const RowView& row, float maximum_value, int bin, float* values) {
  int64_t count = 0;
  const F16 largest = set1(maximum_value);
  const F16 wanted = set1(static_cast<float>(bin));
  for (int64_t at = 0; at < row.vocab; at += 16) {
    const F16 z = load_kept(row, at);
    const Mask is_member = from_int(mass_bin(z, largest)) == wanted;
    count += compress(values + count, is_member & (set1(kNegativeInfinity) < z), z);
  }
  return count;
}

// Each lane's best (value, id), lower ids winning ties; `best` is the best of all lanes.
struct Leader {
  F16 values = set1(kNegativeInfinity);
  U16 ids = set1_u(0x7fffffff);
  float best = kNegativeInfinity;

  void offer(F16 candidates, uint32_t first_id) {
    const U16 candidate_ids = iota() + set1_u(first_id);
    // Ids are below 2^31; their order is the order of the floats from_int gives only up to 2^24, so
    // ties are decided on the id's halves.
    const Mask is_lower = lower(candidate_ids, ids);
    const Mask is_better = (values < candidates) | ((values == candidates) & is_lower);
    values = select(is_better, candidates, values);
    ids = select(is_better, candidate_ids, ids);
  }
  // For offers in order of id: a later lane value must be strictly larger.
  void offer_in_order(F16 candidates, int64_t first_id) {
    const Mask is_better = values < candidates;
    values = select(is_better, candidates, values);
    ids = select(is_better, iota() + set1_u(static_cast<uint32_t>(first_id)), ids);
  }
  void refresh() { best = reduce_max(values); }

  static Mask lower(U16 a, U16 b) {
    // a - b wraps to a set top bit exactly when a < b, for values below 2^31.
    return set1_u_mask(shift_right<31>(a - b));
  }
  static Mask set1_u_mask(U16 zero_or_one) { return set1(0.5f) < from_int(zero_or_one); }

  RaceResult result() const {
    alignas(64) float lane_values[16];
    alignas(64) uint32_t lane_ids[16];
    store(lane_values, values);
    store(lane_ids, ids);
    RaceResult winner{0, kNegativeInfinity};
    bool has_winner = false;
    for (int i = 0; i < 16; ++i) {
      if (lane_values[i] == kNegativeInfinity) continue;
      const auto id = static_cast<int32_t>(lane_ids[i]);
      if (!has_winner || lane_values[i] > winner.score ||
          (lane_values[i] == winner.score && id < winner.token)) {
        winner = {id, lane_values[i]};
        has_winner = true;
      }
    }
    return winner;
  }
};

inline int32_t row_argmax(const RowView& row) {
  Leader leader;
  for (int64_t at = 0; at < row.vocab; at += 16) {
    leader.offer_in_order(load_scaled(row, at), at);
  }
  return leader.result().token;
}

// log max(p - q, 0) = log p + log(1 - q / p), elementwise; log p where there is no draft.
inline F16 residual(F16 log_p, const RowView* draft, int64_t at) {
  if (draft == nullptr || at >= draft->vocab) return log_p;
  const F16 log_q = load_kept(*draft, at) - set1(draft->log_normaliser);
  const F16 ratio = exp(minimum(log_q - log_p, set1(1.0f)));
  const F16 score = log_p + log(set1(1.0f) - ratio);
  return select(log_p <= set1(kNegativeInfinity), set1(kNegativeInfinity), score);
}

inline double residual_mass(const RowView& target, const RowView& draft) {
  D16 sum = zero_d();
  for (int64_t at = 0; at < target.vocab; at += 16) {
    F16 left = exp(load_kept(target, at) - set1(target.log_normaliser));
    if (at < draft.vocab) left = left - exp(load_kept(draft, at) - set1(draft.log_normaliser));
    sum = sum + widen(maximum(left, set1(0.0f)));
  }
  return reduce_add(sum);
}

// Offers the tokens of `target`, whose first id is `first_id`, a multiple of 128, to the leader.
inline void race_span(const RowView& target, int64_t first_id, const RowView* draft,
                      int64_t excluded, const NoiseKey& key, Leader& leader) {
  // No Gumbel variate of 32 bits exceeds 33 ln 2.
  constexpr float kGumbelCeiling = 22.9f;
  const float shift = draft == nullptr ? 0.0f : target.log_normaliser;
  F16 scores[8];
  for (int64_t tile = 0; tile < target.vocab; tile += 128) {
    F16 largest = set1(kNegativeInfinity);
    for (int i = 0; i < 8; ++i) {
      const int64_t at = tile + 16 * i;
      F16 z = set1(kNegativeInfinity);
      if (at < target.vocab) z = load_kept(target, at) - set1(shift);
      if (excluded >= at && excluded < at + 16) {
        const U16 ids = iota() + set1_u(static_cast<uint32_t>(at));
        const U16 difference = ids ^ set1_u(static_cast<uint32_t>(excluded));
        z = select(set1(0.5f) < from_int(difference), z, set1(kNegativeInfinity));
      }
      scores[i] = z;
      largest = maximum(largest, z);
    }
    const float ceiling = reduce_max(largest);
    if (ceiling == kNegativeInfinity || ceiling + kGumbelCeiling < leader.best) continue;
    for (int half = 0; half < 2; ++half) {
      const Philox16 noise = philox(static_cast<uint32_t>((first_id + tile) / 4 + 16 * half), key);
      for (int lane = 0; lane < 4; ++lane) {
        const F16 score = scores[2 * lane + half];
        // A lane that cannot reach the best so far needs no logarithm. The residual is at most p.
        const F16 bound = score + gumbel_bound(noise.lane[lane]) + set1(1e-3f);
        const Mask can_win = (set1(leader.best) <= bound) & (set1(kNegativeInfinity) < score);
        if (to_bits(can_win) == 0) continue;
        const int64_t at = tile + 32 * lane + 16 * half;
        leader.offer(residual(score, draft, at) + gumbel(noise.lane[lane]),
                     static_cast<uint32_t>(first_id + at));
        leader.refresh();
      }
    }
  }
}

inline RaceResult race(const RowView& target, const RowView* draft, int64_t excluded,
                       const NoiseKey& key) {
  Leader leader;
  race_span(target, 0, draft, excluded, key, leader);
  return leader.result();
}

inline RaceResult draw_tile(const RowView& tile, int64_t first_id, const NoiseKey* key,
                            float best) {
  Leader leader;
  if (key != nullptr) {
    leader.best = best;
    race_span(tile, first_id, nullptr, -1, *key, leader);
    return leader.result();
  }
  for (int64_t at = 0; at < tile.vocab; at += 16) {
    leader.offer_in_order(load_scaled(tile, at), first_id + at);
  }
  return leader.result();
}

inline void vocabulary_bits(const NoiseKey& key, int64_t vocab, uint32_t* bits) {
  alignas(64) uint32_t lanes[16];
  for (int64_t tile = 0; tile < vocab; tile += 128) {
    for (int half = 0; half < 2; ++half) {
      const Philox16 noise = philox(static_cast<uint32_t>(tile / 4 + 16 * half), key);
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t at = tile + 32 * lane + 16 * half;
        store(lanes, noise.lane[lane]);
        for (int i = 0; i < 16 && at + i < vocab; ++i) bits[at + i] = lanes[i];
      }
    }
  }
}

// Four independent chains, so that loads and not additions are what it waits for.
inline uint64_t read_block(const void* data, int64_t num_bytes) {
  const auto* words = static_cast<const uint16_t*>(data);
  U16 sums[4];
  for (U16& sum : sums) sum = set1_u(0);
  for (const uint16_t* end = words + num_bytes / 2; words < end; words += 128) {
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + load_words(words + 32 * i);
  }
  alignas(64) uint32_t lanes[16];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  uint64_t total = 0;
  for (const uint32_t lane : lanes) total += lane;
  return total;
}
