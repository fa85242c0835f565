// The paged KV cache manager: which block of KV memory holds which positions of which sequence, and
// how far each model has computed them. It moves integers only; the KV tensors belong to the
// caller.
//
//   block      block_size consecutive positions of one sequence, in every model's KV tensor at the
//              same index. Block 0 is scratch: never handed out, what padding reads and writes.
//   slot       a row of the block table, i.e. a live sequence: 0 … max_sequences - 1.
//   watermark  num_computed_tokens(slot, model): the leading positions whose KV that model has
//              computed. KV at or beyond it is unreachable, so rolling back is lowering a number.
//   index      full blocks of committed tokens, found again by (the prefix before them, their
//              tokens). Hits are compared token by token; a hash only chooses the bucket.
//
// Everything is preallocated by the constructor. `allocate`, `extend`, `fork`, `publish`, `trim`
// and `free` cost O(1) per block they touch, `rollback` O(num_models) whatever it rolls back, and
// none of them allocates heap memory. A slot that is not alive throws UnknownSequenceError, any
// other argument out of range InvalidArgumentError; after an error the state is exactly what it was
// before. Not thread-safe.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace specengine {

struct KVCacheError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfBlocksError : KVCacheError {  // not enough free or evictable blocks
  using KVCacheError::KVCacheError;
};
struct OutOfSlotsError : KVCacheError {  // max_sequences sequences are alive already
  using KVCacheError::KVCacheError;
};
struct UnknownSequenceError : KVCacheError {  // no such slot, or already freed
  using KVCacheError::KVCacheError;
};
struct InvalidArgumentError : KVCacheError {  // names the argument and its value
  using KVCacheError::KVCacheError;
};
struct InvariantError : std::logic_error {  // our own accounting is wrong: a bug in the manager
  using std::logic_error::logic_error;
};

struct PagedKVCacheOptions {
  int64_t num_blocks;               // N, block 0 included: 2 … 2^31 - 1
  int64_t block_size;               // tokens: 1 … 65536
  int64_t max_sequences;            // rows of the block table: 1 … 2^20
  int64_t max_blocks_per_sequence;  // columns of the block table; times block_size < 2^31
  int64_t num_models;               // models that share the tables: 1 … 32
  int32_t* block_table;  // [max_sequences, max_blocks_per_sequence], owned by the caller,
                         // outlives the manager, which alone writes it; unused entries: 0
  bool enable_prefix_cache = true;
};

struct TokenSpan {
  const int32_t* data;
  int64_t size;
};

struct BlockCopy {
  int32_t source;
  int32_t destination;
};

class PagedKVCache {
 public:
  // Throws InvalidArgumentError, before allocating, for options outside the ranges above or for
  // more than 4 GiB of bookkeeping (roughly num_blocks * (60 + 4 * block_size) bytes).
  explicit PagedKVCache(const PagedKVCacheOptions& options);

  PagedKVCache(const PagedKVCache&) = delete;
  PagedKVCache& operator=(const PagedKVCache&) = delete;

  // --- A sequence's life ---------------------------------------------------------------------

  // Starts a sequence and returns its slot. Its first blocks are the longest chain of indexed
  // blocks that spells token_ids, at most max_cached_tokens of them; the chain goes on as long as
  // any model computed the block, and each model's watermark stops at the first block that model
  // has not computed. A caller that needs logits passes the prompt's length minus one.
  // Throws OutOfSlotsError; InvalidArgumentError if token_ids can never fit in a row.
  int64_t allocate(TokenSpan token_ids, int64_t max_cached_tokens);

  // Makes positions [0, num_tokens) addressable and [first_position, num_tokens) writable; to be
  // called before every write, with the lowest position that any model will write. Returns the
  // blocks to copy in every model's KV tensor before writing (valid until the next call). Throws
  // OutOfBlocksError.
  //
  // A block with other references is replaced by a fresh copy. A block of this sequence alone is
  // written in place, by this rule: below a model's watermark a write repeats the bits that are
  // there, at or above it anything may come. So an indexed block stays findable for the models
  // whose watermark covers what is written in it, and is withdrawn from the index for the others.
  // What another sequence can find therefore never changes.
  const std::vector<BlockCopy>& extend(int64_t slot, int64_t first_position, int64_t num_tokens);

  // Fresh blocks that extend would take now: copies on write and new blocks.
  int64_t num_blocks_needed(int64_t slot, int64_t first_position, int64_t num_tokens) const;
  bool can_extend(int64_t slot, int64_t first_position, int64_t num_tokens) const;

  // The watermark. set_computed may raise or lower it, up to capacity(slot).
  int64_t num_computed_tokens(int64_t slot, int64_t model) const;
  void set_computed(int64_t slot, int64_t model, int64_t num_tokens);

  // Lowers every model's watermark to at most num_tokens. Copies nothing, frees nothing.
  void rollback(int64_t slot, int64_t num_tokens);

  // A new sequence that shares the blocks covering [0, num_tokens), num_tokens <= capacity(slot);
  // its watermarks are the parent's, at most num_tokens. Throws OutOfSlotsError.
  int64_t fork(int64_t slot, int64_t num_tokens);

  // Indexes the full blocks of token_ids (the sequence's committed tokens, or a prefix of them)
  // that at least one model has computed, and notes which models have. Continues where the last
  // call stopped: O(num_models) if nothing is new. Where an equal block is indexed already, that
  // one stays and ours is not indexed; should it be evicted, what hangs on it is not found until
  // its owner publishes ours.
  void publish(int64_t slot, TokenSpan token_ids);

  // Gives back the blocks beyond those that cover [0, num_tokens); watermarks follow the capacity.
  void trim(int64_t slot, int64_t num_tokens);

  // Ends the sequence. Blocks nobody else refers to become evictable if they are indexed (least
  // recently freed first, a sequence's last block before its first), else free. The caller has no
  // write to them in flight.
  void free(int64_t slot);

  // Empties the index. Live sequences keep their blocks and may publish them again.
  void reset_prefix_cache();

  // --- Observers -----------------------------------------------------------------------------

  int64_t num_blocks() const { return options_.num_blocks; }
  int64_t block_size() const { return options_.block_size; }
  int64_t num_free_blocks() const;    // free + evictable: what extend can still take
  int64_t num_cached_blocks() const;  // indexed, referenced or not
  // Times that the tokens of a block were hashed so far, to be looked up or published.
  int64_t num_hashed_blocks() const { return num_hashed_blocks_; }
  int64_t num_sequences() const;
  int64_t capacity(int64_t slot) const;  // addressable positions: blocks * block_size
  int64_t reference_count(int64_t block) const;
  std::vector<int32_t> sequence_blocks(int64_t slot) const;

  // Recounts everything and throws InvariantError, with numbers, at the first contradiction.
  // O(num_blocks + block table); for tests.
  void check_invariants() const;

 private:
  static const PagedKVCacheOptions& checked(const PagedKVCacheOptions& options);

  // Names a prefix (all tokens up to and including a block) for as long as it is indexed. Never
  // reused, so a chain cannot pass through a block that meanwhile holds something else.
  using PrefixId = uint64_t;
  static constexpr PrefixId kNoPrefix = 0;
  static constexpr PrefixId kEmptyPrefix = 1;  // the parent of every first block

  // Block 0 holds no data of its own and so ends the bucket chains and heads the evictable list.
  static constexpr int32_t kNoBlock = 0;

  struct Block {
    int32_t reference_count = 0;
    int32_t older = kNoBlock, newer = kNoBlock;  // neighbours in the list of evictable blocks
    int32_t next_in_bucket = kNoBlock;
    uint32_t bucket = 0;
    uint32_t computed_models = 0;  // bit m: model m's KV is complete; set for indexed blocks only
    PrefixId prefix = kNoPrefix;   // what was published here, indexed under …
    int32_t entry = kNoBlock;      // … this block: itself, or an equal one that came first
    PrefixId parent = kNoPrefix;   // of an indexed block: the prefix before it
  };

  struct Sequence {
    bool is_active = false;
    int64_t num_blocks = 0;
    int64_t num_published_blocks = 0;  // leading blocks that publish has dealt with
  };

  struct BlockRange {
    int64_t begin;
    int64_t end;
  };

  struct ModelProgress {
    int64_t num_computed_tokens = 0;
    int64_t num_marked_blocks = 0;  // leading blocks whose computed_models publish has updated
  };

  // Slots
  int64_t take_slot();
  const Sequence& checked_sequence(int64_t slot) const;
  Sequence& checked_sequence(int64_t slot);
  int64_t checked_model(int64_t model) const;
  int32_t* row(int64_t slot) const;
  ModelProgress* progress(int64_t slot) { return &progress_[slot * options_.num_models]; }
  const ModelProgress* progress(int64_t slot) const {
    return &progress_[slot * options_.num_models];
  }
  int64_t max_sequence_tokens() const;
  int64_t num_blocks_for(int64_t num_tokens) const;
  BlockRange written_blocks(int64_t slot, int64_t first_position, int64_t num_tokens) const;
  void release_blocks_from(int64_t slot, int64_t first_block);
  void limit_published(int64_t slot, int64_t num_blocks);

  // Blocks
  int32_t take_block();
  void release_block(int32_t block);
  void append_evictable(int32_t block);
  void remove_evictable(int32_t block);
  void add_reference(int32_t block);
  void make_writable(int64_t slot, int64_t block_index, int64_t write_end);
  void withdraw_rewritten(int64_t slot, int64_t block_index, int64_t write_end);

  // Index
  bool is_indexed(int32_t block) const;
  bool has_indexed_prefix(int32_t block) const;
  bool spells(int32_t block, PrefixId parent, const int32_t* tokens) const;
  uint32_t bucket_of(PrefixId parent, const int32_t* tokens) const;
  int32_t find(PrefixId parent, const int32_t* tokens) const;
  void add_to_index(int32_t block, PrefixId parent, const int32_t* tokens);
  void remove_from_index(int32_t block);
  void share_indexed_blocks(int64_t slot, TokenSpan token_ids);
  void publish_block(int64_t slot, int64_t block_index, const int32_t* tokens);
  void mark_computed_blocks(int64_t slot, int64_t model);

  // Invariants
  void check_sequences() const;
  void check_references() const;
  void check_lists() const;
  void check_index() const;

  const PagedKVCacheOptions options_;
  std::vector<Block> blocks_;            // [num_blocks]
  std::vector<int32_t> block_tokens_;    // [num_blocks, block_size], of indexed blocks
  std::vector<int32_t> buckets_;         // first block of each chain
  std::vector<int32_t> free_blocks_;     // a stack
  std::vector<int32_t> free_slots_;      // a stack
  std::vector<Sequence> sequences_;      // [max_sequences]
  std::vector<ModelProgress> progress_;  // [max_sequences, num_models]
  std::vector<BlockCopy> copies_;        // what extend returns
  int64_t num_evictable_blocks_ = 0;
  int64_t num_indexed_blocks_ = 0;
  mutable int64_t num_hashed_blocks_ = 0;
  PrefixId last_prefix_ = kEmptyPrefix;
};

}  // namespace specengine
