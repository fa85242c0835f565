#include "core/paged_kv_cache.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>
#include <utility>

namespace specengine {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxBookkeepingBytes = int64_t{4} << 30;

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw InvalidArgumentError(text(name, "=", value, " is outside [", low, ", ", high, "]"));
  }
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw InvariantError(text(parts...));
}

size_t power_of_two_at_least(int64_t value) {
  size_t power = 1;
  while (power < static_cast<size_t>(value)) power *= 2;
  return power;
}

}  // namespace

// --- Construction ------------------------------------------------------------------------------

const PagedKVCacheOptions& PagedKVCache::checked(const PagedKVCacheOptions& options) {
  check_range("num_blocks", options.num_blocks, 2, kMaxInt32);
  check_range("block_size", options.block_size, 1, 65536);
  check_range("max_sequences", options.max_sequences, 1, 1 << 20);
  check_range("max_blocks_per_sequence", options.max_blocks_per_sequence, 1,
              kMaxInt32 / options.block_size);
  check_range("num_models", options.num_models, 1, 32);
  const auto address = reinterpret_cast<uintptr_t>(options.block_table);
  if (address == 0 || address % alignof(int32_t) != 0) {
    throw InvalidArgumentError(text("block_table_address=", address, " holds no int32 array"));
  }
  // A bucket array is at most twice num_blocks long.
  const int64_t block_bytes = sizeof(Block) + (options.block_size + 3) * sizeof(int32_t);
  const int64_t bytes = options.num_blocks * block_bytes;
  if (bytes > kMaxBookkeepingBytes) {
    throw InvalidArgumentError(text("num_blocks=", options.num_blocks,
                                    " with block_size=", options.block_size, " needs ", bytes >> 20,
                                    " MiB of bookkeeping, more than the limit of ",
                                    kMaxBookkeepingBytes >> 20, " MiB"));
  }
  return options;
}

PagedKVCache::PagedKVCache(const PagedKVCacheOptions& options)
    : options_(checked(options)),
      blocks_(options.num_blocks),
      block_tokens_(options.num_blocks * options.block_size),
      buckets_(power_of_two_at_least(options.num_blocks), kNoBlock),
      sequences_(options.max_sequences),
      progress_(options.max_sequences * options.num_models) {
  free_blocks_.reserve(options.num_blocks);
  for (int64_t block = options.num_blocks - 1; block > 0; --block) free_blocks_.push_back(block);
  free_slots_.reserve(options.max_sequences);
  for (int64_t slot = options.max_sequences - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  copies_.reserve(std::min(options.num_blocks, options.max_blocks_per_sequence));
  std::fill_n(options.block_table, options.max_sequences * options.max_blocks_per_sequence,
              kNoBlock);
}

// --- A sequence's life -------------------------------------------------------------------------

int64_t PagedKVCache::allocate(TokenSpan token_ids, int64_t max_cached_tokens) {
  check_range("len(token_ids)", token_ids.size, 0, max_sequence_tokens());
  check_range("max_cached_tokens", max_cached_tokens, 0, max_sequence_tokens());
  const int64_t slot = take_slot();
  const int64_t num_cached_tokens = std::min(token_ids.size, max_cached_tokens);
  if (options_.enable_prefix_cache) share_indexed_blocks(slot, {token_ids.data, num_cached_tokens});
  return slot;
}

const std::vector<BlockCopy>& PagedKVCache::extend(int64_t slot, int64_t first_position,
                                                   int64_t num_tokens) {
  const int64_t num_needed = num_blocks_needed(slot, first_position, num_tokens);
  if (num_needed > num_free_blocks()) {
    throw OutOfBlocksError(text("extending slot ", slot, " to ", num_tokens, " tokens needs ",
                                num_needed, " blocks of ", options_.block_size, " tokens, but ",
                                num_free_blocks(), " of ", options_.num_blocks - 1, " are free"));
  }
  copies_.clear();
  const BlockRange written = written_blocks(slot, first_position, num_tokens);
  for (int64_t i = written.begin; i < written.end; ++i) {
    make_writable(slot, i, std::min(num_tokens, (i + 1) * options_.block_size));
  }
  int64_t& num_blocks = sequences_[slot].num_blocks;
  while (num_blocks < num_blocks_for(num_tokens)) row(slot)[num_blocks++] = take_block();
  return copies_;
}

int64_t PagedKVCache::num_blocks_needed(int64_t slot, int64_t first_position,
                                        int64_t num_tokens) const {
  const Sequence& sequence = checked_sequence(slot);
  check_range("num_tokens", num_tokens, 0, max_sequence_tokens());
  check_range("first_position", first_position, 0, num_tokens);
  int64_t num_needed = std::max<int64_t>(0, num_blocks_for(num_tokens) - sequence.num_blocks);
  const BlockRange written = written_blocks(slot, first_position, num_tokens);
  for (int64_t i = written.begin; i < written.end; ++i) {
    num_needed += blocks_[row(slot)[i]].reference_count > 1;
  }
  return num_needed;
}

bool PagedKVCache::can_extend(int64_t slot, int64_t first_position, int64_t num_tokens) const {
  return num_blocks_needed(slot, first_position, num_tokens) <= num_free_blocks();
}

int64_t PagedKVCache::num_computed_tokens(int64_t slot, int64_t model) const {
  checked_sequence(slot);
  return progress(slot)[checked_model(model)].num_computed_tokens;
}

void PagedKVCache::set_computed(int64_t slot, int64_t model, int64_t num_tokens) {
  checked_sequence(slot);
  checked_model(model);
  check_range("num_tokens", num_tokens, 0, capacity(slot));
  progress(slot)[model].num_computed_tokens = num_tokens;
}

void PagedKVCache::rollback(int64_t slot, int64_t num_tokens) {
  checked_sequence(slot);
  check_range("num_tokens", num_tokens, 0, max_sequence_tokens());
  for (int64_t model = 0; model < options_.num_models; ++model) {
    int64_t& watermark = progress(slot)[model].num_computed_tokens;
    watermark = std::min(watermark, num_tokens);
  }
}

int64_t PagedKVCache::fork(int64_t slot, int64_t num_tokens) {
  check_range("num_tokens", num_tokens, 0, capacity(slot));
  const int64_t child = take_slot();
  const int64_t num_blocks = num_blocks_for(num_tokens);
  for (int64_t i = 0; i < num_blocks; ++i) {
    row(child)[i] = row(slot)[i];
    add_reference(row(child)[i]);
  }
  sequences_[child] = sequences_[slot];
  sequences_[child].num_blocks = num_blocks;
  std::copy_n(progress(slot), options_.num_models, progress(child));
  limit_published(child, num_tokens / options_.block_size);
  rollback(child, num_tokens);
  return child;
}

void PagedKVCache::publish(int64_t slot, TokenSpan token_ids) {
  Sequence& sequence = checked_sequence(slot);
  if (!options_.enable_prefix_cache) return;
  while (sequence.num_published_blocks > 0 &&
         !has_indexed_prefix(row(slot)[sequence.num_published_blocks - 1])) {
    limit_published(slot, sequence.num_published_blocks - 1);
  }
  int64_t num_tokens = 0;
  for (int64_t model = 0; model < options_.num_models; ++model) {
    num_tokens = std::max(num_tokens, progress(slot)[model].num_computed_tokens);
  }
  num_tokens = std::min(num_tokens, token_ids.size);
  for (int64_t& i = sequence.num_published_blocks; i < num_tokens / options_.block_size; ++i) {
    publish_block(slot, i, token_ids.data + i * options_.block_size);
  }
  for (int64_t model = 0; model < options_.num_models; ++model) mark_computed_blocks(slot, model);
}

void PagedKVCache::trim(int64_t slot, int64_t num_tokens) {
  checked_sequence(slot);
  check_range("num_tokens", num_tokens, 0, max_sequence_tokens());
  release_blocks_from(slot, num_blocks_for(num_tokens));
}

void PagedKVCache::free(int64_t slot) {
  checked_sequence(slot);
  release_blocks_from(slot, 0);
  sequences_[slot].is_active = false;
  free_slots_.push_back(slot);
}

void PagedKVCache::reset_prefix_cache() {
  while (num_evictable_blocks_ > 0) {
    const int32_t block = blocks_[kNoBlock].newer;
    remove_evictable(block);
    remove_from_index(block);
    free_blocks_.push_back(block);
  }
  for (int32_t block = 1; block < options_.num_blocks; ++block) {
    if (is_indexed(block)) remove_from_index(block);
  }
}

// --- Observers ---------------------------------------------------------------------------------

int64_t PagedKVCache::num_free_blocks() const {
  return free_blocks_.size() + num_evictable_blocks_;
}

int64_t PagedKVCache::num_cached_blocks() const { return num_indexed_blocks_; }

int64_t PagedKVCache::num_sequences() const { return options_.max_sequences - free_slots_.size(); }

int64_t PagedKVCache::capacity(int64_t slot) const {
  return checked_sequence(slot).num_blocks * options_.block_size;
}

int64_t PagedKVCache::reference_count(int64_t block) const {
  check_range("block", block, 0, options_.num_blocks - 1);
  return blocks_[block].reference_count;
}

std::vector<int32_t> PagedKVCache::sequence_blocks(int64_t slot) const {
  const int64_t num_blocks = checked_sequence(slot).num_blocks;
  return {row(slot), row(slot) + num_blocks};
}

// --- Slots -------------------------------------------------------------------------------------

int64_t PagedKVCache::take_slot() {
  if (free_slots_.empty()) {
    throw OutOfSlotsError(text("all max_sequences=", options_.max_sequences, " slots are taken"));
  }
  const int64_t slot = free_slots_.back();
  free_slots_.pop_back();
  sequences_[slot] = Sequence{};
  sequences_[slot].is_active = true;
  std::fill_n(progress(slot), options_.num_models, ModelProgress{});
  return slot;
}

const PagedKVCache::Sequence& PagedKVCache::checked_sequence(int64_t slot) const {
  if (slot < 0 || slot >= options_.max_sequences || !sequences_[slot].is_active) {
    throw UnknownSequenceError(text("slot=", slot, " holds no sequence (max_sequences=",
                                    options_.max_sequences, ", ", num_sequences(), " alive)"));
  }
  return sequences_[slot];
}

PagedKVCache::Sequence& PagedKVCache::checked_sequence(int64_t slot) {
  return const_cast<Sequence&>(std::as_const(*this).checked_sequence(slot));
}

int64_t PagedKVCache::checked_model(int64_t model) const {
  check_range("model", model, 0, options_.num_models - 1);
  return model;
}

int32_t* PagedKVCache::row(int64_t slot) const {
  return options_.block_table + slot * options_.max_blocks_per_sequence;
}

int64_t PagedKVCache::max_sequence_tokens() const {
  return options_.max_blocks_per_sequence * options_.block_size;
}

int64_t PagedKVCache::num_blocks_for(int64_t num_tokens) const {
  return (num_tokens + options_.block_size - 1) / options_.block_size;
}

// The blocks the sequence has already among those of positions [first_position, num_tokens).
PagedKVCache::BlockRange PagedKVCache::written_blocks(int64_t slot, int64_t first_position,
                                                      int64_t num_tokens) const {
  if (first_position == num_tokens) return {0, 0};
  return {first_position / options_.block_size,
          std::min(num_blocks_for(num_tokens), sequences_[slot].num_blocks)};
}

// From the last block to the first, so that a chain is evicted from its end.
void PagedKVCache::release_blocks_from(int64_t slot, int64_t first_block) {
  Sequence& sequence = sequences_[slot];
  while (sequence.num_blocks > first_block) {
    int32_t& block = row(slot)[--sequence.num_blocks];
    release_block(block);
    block = kNoBlock;
  }
  limit_published(slot, sequence.num_blocks);
  rollback(slot, sequence.num_blocks * options_.block_size);
}

void PagedKVCache::limit_published(int64_t slot, int64_t num_blocks) {
  int64_t& num_published_blocks = sequences_[slot].num_published_blocks;
  num_published_blocks = std::min(num_published_blocks, num_blocks);
  for (int64_t model = 0; model < options_.num_models; ++model) {
    int64_t& num_marked_blocks = progress(slot)[model].num_marked_blocks;
    num_marked_blocks = std::min(num_marked_blocks, num_blocks);
  }
}

// --- Blocks ------------------------------------------------------------------------------------

// The caller has made sure that num_free_blocks() > 0.
int32_t PagedKVCache::take_block() {
  int32_t block;
  if (!free_blocks_.empty()) {
    block = free_blocks_.back();
    free_blocks_.pop_back();
  } else {
    block = blocks_[kNoBlock].newer;
    remove_evictable(block);
    remove_from_index(block);
  }
  blocks_[block].reference_count = 1;
  return block;
}

void PagedKVCache::release_block(int32_t block) {
  if (--blocks_[block].reference_count > 0) return;
  if (is_indexed(block)) {
    append_evictable(block);
  } else {
    blocks_[block].prefix = kNoPrefix;
    free_blocks_.push_back(block);
  }
}

void PagedKVCache::add_reference(int32_t block) {
  if (blocks_[block].reference_count++ == 0) remove_evictable(block);
}

void PagedKVCache::append_evictable(int32_t block) {
  const int32_t newest = blocks_[kNoBlock].older;
  blocks_[block].older = newest;
  blocks_[block].newer = kNoBlock;
  blocks_[newest].newer = block;
  blocks_[kNoBlock].older = block;
  ++num_evictable_blocks_;
}

void PagedKVCache::remove_evictable(int32_t block) {
  const auto [older, newer] = std::pair(blocks_[block].older, blocks_[block].newer);
  blocks_[older].newer = newer;
  blocks_[newer].older = older;
  --num_evictable_blocks_;
}

// Before a write that ends at position write_end (within the block or at its end).
void PagedKVCache::make_writable(int64_t slot, int64_t block_index, int64_t write_end) {
  int32_t& block = row(slot)[block_index];
  if (blocks_[block].reference_count == 1) {
    withdraw_rewritten(slot, block_index, write_end);
    return;
  }
  copies_.push_back({block, take_block()});
  release_block(block);
  block = copies_.back().destination;
  limit_published(slot, block_index);
}

// The rule of extend: content at or above a model's watermark may change, so the block is no hit
// for that model any more; once no model's is left, what was published here is void.
void PagedKVCache::withdraw_rewritten(int64_t slot, int64_t block_index, int64_t write_end) {
  const int32_t id = row(slot)[block_index];
  Block& block = blocks_[id];
  bool is_token_kept = false;
  for (int64_t model = 0; model < options_.num_models; ++model) {
    ModelProgress& of_model = progress(slot)[model];
    if (of_model.num_computed_tokens >= write_end) {
      is_token_kept = true;
    } else {
      block.computed_models &= ~(uint32_t{1} << model);
      of_model.num_marked_blocks = std::min(of_model.num_marked_blocks, block_index);
    }
  }
  if (is_indexed(id) && block.computed_models == 0) remove_from_index(id);
  if (!is_token_kept) block.prefix = kNoPrefix;
  if (block.prefix == kNoPrefix) limit_published(slot, block_index);
}

// --- Index -------------------------------------------------------------------------------------

bool PagedKVCache::is_indexed(int32_t block) const {
  return blocks_[block].prefix != kNoPrefix && blocks_[block].entry == block;
}

bool PagedKVCache::has_indexed_prefix(int32_t block) const {
  const PrefixId prefix = blocks_[block].prefix;
  return prefix != kNoPrefix && blocks_[blocks_[block].entry].prefix == prefix;
}

bool PagedKVCache::spells(int32_t block, PrefixId parent, const int32_t* tokens) const {
  return blocks_[block].parent == parent && std::equal(tokens, tokens + options_.block_size,
                                                       &block_tokens_[block * options_.block_size]);
}

uint32_t PagedKVCache::bucket_of(PrefixId parent, const int32_t* tokens) const {
  constexpr uint64_t kOddConstant = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
  uint64_t hash = parent * kOddConstant;
  ++num_hashed_blocks_;
  for (int64_t i = 0; i < options_.block_size; ++i) {
    hash = ((hash ^ (hash >> 32)) + static_cast<uint32_t>(tokens[i])) * kOddConstant;
  }
  return static_cast<uint32_t>(hash >> 32) & static_cast<uint32_t>(buckets_.size() - 1);
}

int32_t PagedKVCache::find(PrefixId parent, const int32_t* tokens) const {
  int32_t block = buckets_[bucket_of(parent, tokens)];
  while (block != kNoBlock && !spells(block, parent, tokens)) block = blocks_[block].next_in_bucket;
  return block;
}

void PagedKVCache::add_to_index(int32_t id, PrefixId parent, const int32_t* tokens) {
  Block& block = blocks_[id];
  std::copy_n(tokens, options_.block_size, &block_tokens_[id * options_.block_size]);
  block.prefix = ++last_prefix_;
  block.entry = id;
  block.parent = parent;
  block.computed_models = 0;
  block.bucket = bucket_of(parent, tokens);
  block.next_in_bucket = buckets_[block.bucket];
  buckets_[block.bucket] = id;
  ++num_indexed_blocks_;
}

void PagedKVCache::remove_from_index(int32_t id) {
  Block& block = blocks_[id];
  int32_t* link = &buckets_[block.bucket];
  while (*link != id) link = &blocks_[*link].next_in_bucket;
  *link = block.next_in_bucket;
  block.prefix = kNoPrefix;
  --num_indexed_blocks_;
}

// Each model is up to date as far as every block so far was a hit for it.
void PagedKVCache::share_indexed_blocks(int64_t slot, TokenSpan token_ids) {
  Sequence& sequence = sequences_[slot];
  uint32_t up_to_date_models = ~uint32_t{0};
  PrefixId parent = kEmptyPrefix;
  for (int64_t i = 0; i < token_ids.size / options_.block_size; ++i) {
    const int32_t block = find(parent, token_ids.data + i * options_.block_size);
    if (block == kNoBlock) break;
    add_reference(block);
    row(slot)[sequence.num_blocks++] = block;
    parent = blocks_[block].prefix;
    up_to_date_models &= blocks_[block].computed_models;
    for (int64_t model = 0; model < options_.num_models; ++model) {
      if ((up_to_date_models >> model & 1) == 0) continue;
      progress(slot)[model] = {(i + 1) * options_.block_size, i + 1};
    }
  }
  sequence.num_published_blocks = sequence.num_blocks;
}

// The blocks before this one have been published, and their prefix is indexed.
void PagedKVCache::publish_block(int64_t slot, int64_t block_index, const int32_t* tokens) {
  const int32_t block = row(slot)[block_index];
  const PrefixId parent =
      block_index == 0 ? kEmptyPrefix : blocks_[row(slot)[block_index - 1]].prefix;
  if (is_indexed(block)) {
    if (spells(block, parent, tokens)) return;
    remove_from_index(block);  // it hangs on a prefix that has left the index
  }
  const int32_t equal_block = find(parent, tokens);
  if (equal_block == kNoBlock) {
    add_to_index(block, parent, tokens);
  } else {
    blocks_[block].prefix = blocks_[equal_block].prefix;
    blocks_[block].entry = equal_block;
  }
}

void PagedKVCache::mark_computed_blocks(int64_t slot, int64_t model) {
  ModelProgress& of_model = progress(slot)[model];
  const int64_t num_blocks = std::min(sequences_[slot].num_published_blocks,
                                      of_model.num_computed_tokens / options_.block_size);
  for (int64_t& i = of_model.num_marked_blocks; i < num_blocks; ++i) {
    const int32_t block = row(slot)[i];
    if (is_indexed(block)) blocks_[block].computed_models |= uint32_t{1} << model;
  }
}

// --- Invariants --------------------------------------------------------------------------------

void PagedKVCache::check_invariants() const {
  check_sequences();
  check_references();
  check_lists();
  check_index();
}

void PagedKVCache::check_sequences() const {
  int64_t num_active = 0;
  for (int64_t slot = 0; slot < options_.max_sequences; ++slot) {
    const Sequence& sequence = sequences_[slot];
    num_active += sequence.is_active;
    const int64_t num_blocks = sequence.is_active ? sequence.num_blocks : 0;
    for (int64_t i = 0; i < options_.max_blocks_per_sequence; ++i) {
      const int32_t block = row(slot)[i];
      require(i < num_blocks ? block > 0 && block < options_.num_blocks : block == kNoBlock,
              "block_table[", slot, "][", i, "] = ", block, " with ", num_blocks, " blocks in use");
    }
    if (!sequence.is_active) continue;
    require(sequence.num_published_blocks <= num_blocks, "slot ", slot, " published ",
            sequence.num_published_blocks, " of ", num_blocks, " blocks");
    for (int64_t model = 0; model < options_.num_models; ++model) {
      const auto [num_computed_tokens, num_marked_blocks] = progress(slot)[model];
      require(num_computed_tokens >= 0 && num_computed_tokens <= capacity(slot), "slot ", slot,
              " model ", model, " computed ", num_computed_tokens, " of ", capacity(slot));
      require(num_marked_blocks <= sequence.num_published_blocks, "slot ", slot, " model ", model,
              " marked ", num_marked_blocks, " of ", sequence.num_published_blocks);
    }
  }
  require(num_active == num_sequences(), num_active, " sequences are active, ", num_sequences(),
          " slots are taken");
}

void PagedKVCache::check_references() const {
  std::vector<int32_t> counts(options_.num_blocks);
  for (int64_t slot = 0; slot < options_.max_sequences; ++slot) {
    if (!sequences_[slot].is_active) continue;
    for (int32_t block : sequence_blocks(slot)) ++counts[block];
  }
  for (int64_t block = 0; block < options_.num_blocks; ++block) {
    require(blocks_[block].reference_count == counts[block], "block ", block, " counts ",
            blocks_[block].reference_count, " references, the tables hold ", counts[block]);
  }
}

// Every block but the scratch block is referenced, free or evictable: exactly one of them.
void PagedKVCache::check_lists() const {
  std::vector<int32_t> num_places(options_.num_blocks);
  for (int64_t block = 0; block < options_.num_blocks; ++block) {
    num_places[block] = blocks_[block].reference_count > 0;
  }
  for (int32_t block : free_blocks_) {
    require(blocks_[block].prefix == kNoPrefix, "block ", block, " is free and published");
    ++num_places[block];
  }
  int64_t num_evictable = 0;
  for (int32_t block = blocks_[kNoBlock].newer; block != kNoBlock; block = blocks_[block].newer) {
    require(++num_evictable <= num_evictable_blocks_, "more than ", num_evictable_blocks_,
            " blocks are evictable");
    require(is_indexed(block), "block ", block, " is evictable but not indexed");
    require(blocks_[blocks_[block].newer].older == block, "block ", block, " is badly linked");
    ++num_places[block];
  }
  require(num_evictable == num_evictable_blocks_, num_evictable, " blocks are evictable, counted ",
          num_evictable_blocks_);
  for (int64_t block = 0; block < options_.num_blocks; ++block) {
    require(num_places[block] == (block != kNoBlock), "block ", block, " is in ", num_places[block],
            " places");
  }
}

void PagedKVCache::check_index() const {
  int64_t num_indexed = 0;
  for (int32_t id = 1; id < options_.num_blocks; ++id) {
    if (!is_indexed(id)) continue;
    ++num_indexed;
    const Block& block = blocks_[id];
    const int32_t* tokens = &block_tokens_[id * options_.block_size];
    require(find(block.parent, tokens) == id, "block ", id, " is indexed but block ",
            find(block.parent, tokens), " is found");
    require(
        block.computed_models != 0 && uint64_t{block.computed_models} >> options_.num_models == 0,
        "block ", id, " is indexed for models ", block.computed_models);
    require(block.prefix <= last_prefix_ && block.parent < block.prefix, "block ", id,
            " has prefix ", block.prefix, " after parent ", block.parent);
  }
  require(num_indexed == num_indexed_blocks_, num_indexed, " blocks are indexed, counted ",
          num_indexed_blocks_);
}

}  // namespace specengine
