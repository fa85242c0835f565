// The native ops on raw pointers: they parallelise and combine the kernels of the instruction set
// in use. Shapes and meaning are those of specengine.kernels.reference; every pointer was checked
// before.
#pragma once

#include <cstdint>

#include "core/drafts.h"
#include "core/kernels.h"
#include "core/rows.h"
#include "core/transforms.h"

namespace specengine {

// --- pack_linear.cpp

// An [out_features, in_features] weight as a checkpoint has it.
struct WeightView {
  const void* data;
  DType dtype;
  int64_t out_features, in_features;
  int64_t out_stride, in_stride;
};

// Of the packed layout (kernels.h) of an [out_features, in_features] weight.
int64_t packed_bytes(int64_t out_features, int64_t in_features, DType dtype);
// To int8 each output channel is rounded: scale = max |w| / 127, w / scale to the nearest integer,
// ties to even; a channel that is not finite has the scale NaN. `scale` is for int8 only.
void pack_linear(const WeightView& weight, DType dtype, void* panels, float* scale);

// A weight by group: codes [out_features, in_features], scale and minimum (null but for kInt4Min)
// [out_features, in_features / kGroupK] in the bits of fp16.
struct GroupedView {
  const int8_t* codes;
  const uint16_t* scale;
  const uint16_t* minimum;
  int64_t out_features, in_features;
};
void pack_grouped(const GroupedView& weight, DType dtype, void* panels);

// --- linear.cpp

struct LinearWeight {
  const void* panels;
  DType dtype;
  const float* scale;  // [out_features] of int8 weights, else null
  const float* bias;   // or null
  int64_t in_features;
  int64_t out_features;
};

struct NormWeight {
  const float* weight;
  const float* bias;  // null: RMSNorm
  float eps;
};

void embed(const int32_t* token_ids, const int32_t* positions, int64_t num_rows, int64_t width,
           const void* token_table, const void* position_table, DType dtype, float* out);

// out = activation(norm(x) W^T + b) (+ residual), for `num_columns` columns; norm may be null.
struct LinearCall {
  const float* x;
  int64_t num_rows;
  const NormWeight* norm;
  const LinearWeight* weight;
  Activation activation;
  const float* residual;
  float* out;
  int64_t out_stride;
  int64_t num_columns;
};
void linear(const LinearCall& call);

// The same layer in tiles of kTileColumns columns, nothing of it stored: `consume` gets each tile
// [num_rows, kTileColumns] once, from any thread, with the first column and the number of columns
// in it. `call.out` and `call.residual` are not used.
constexpr int64_t kTileColumns = 128;
using TileConsumer = void (*)(void* context, int64_t first_column, int64_t num_columns,
                              const float* tile);
void linear_tiles(const LinearCall& call, TileConsumer consume, void* context);

// The last norm and a head with a row for every token; or for those in `token_ids` alone, which
// ascend.
struct Head {
  NormWeight norm;
  LinearWeight weight;
  Ints token_ids = {};

  bool has_all_tokens() const { return token_ids.empty(); }
  // Rows, of those for tokens below `vocab_size`.
  int64_t num_rows(int64_t vocab_size) const;
};

// Tokens that the head has no row for, and columns from `vocab_size` on, are -inf.
void head(const float* hidden, int64_t num_rows, const Head& weights, int64_t vocab_size,
          float* logits, int64_t padded_vocab_size);

// Each row's draw: argmax of the logits where its temperature is 0, else the race on the target's
// stream at its position over what the row's filters keep. error is 1 where a row holds a NaN or
// nothing finite. Only rows with a filter need their logits kept until all are known: in a buffer
// of the thread's.
struct DrawRows {
  SamplingRows rows;
  const int32_t* positions;
  int32_t* tokens;
  int32_t* error;
  const RowTransform* transforms = nullptr;  // done to each row's logits first; or null
};
void head_draw(const float* hidden, int64_t num_rows, const Head& weights, int64_t vocab_size,
               const DrawRows& draws);

struct KvAppend {
  const int32_t* positions;
  const int64_t* kv_slots;
  void* kv_cache;  // [2, N, Hkv, block_size, head_dim]
  DType dtype;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  const float* rotary;  // [P, 2, half] or null
  int64_t rotary_half;
  const float* head_norm = nullptr;  // [2, head_dim]: RMSNorm of each query's and key's head
};
void norm_qkv(const float* hidden, int64_t num_rows, const NormWeight& norm,
              const LinearWeight& weight, const KvAppend& append, float* query);

// --- attention.cpp

void paged_attention(const AttentionArgs& args, int64_t num_sequences);

// --- sampling.cpp

// Rows of logits; row r starts at data + r * stride.
struct LogitRows {
  const float* data;
  int64_t stride;
  int64_t num_rows;
  int64_t vocab;
  const float* row(int64_t index) const { return data + index * stride; }
};

enum StatsColumn { kStatMaximum, kStatThreshold, kStatLogNormaliser, kStatError, kNumStats };

// The target's draw at row r of `rows` as filter_rows and sample_rows make it, and whether the
// row is bad.
struct FilteredDraw {
  int32_t token;
  bool is_bad;
};
FilteredDraw draw_filtered(const float* logits, int64_t vocab, const SamplingRows& rows, int64_t r,
                           const NoiseKey& key);

void filter_rows(const LogitRows& logits, const SamplingRows& rows, float* stats);

void sample_rows(const LogitRows& logits, const float* stats, const SamplingRows& rows,
                 const int32_t* positions, uint32_t stream, const int32_t* round_base,
                 int32_t* tokens, float* log_probs);

// What every verification reads and writes. Each judges the running sequences of its own rule.
struct VerifyCall {
  LogitRows logits;
  const float* stats;  // [R, 4]
  const Drafts& drafts;
  const SamplingRows& rows;  // [B]
  Ints is_running;           // [B]
  Verdict verdict;

  bool is_judged_by(Rule rule, int64_t b) const {
    return is_running[b] != 0 && drafts.rule_of(b, rows.rule[b]) == rule;
  }
};
// Raises where a sequence that the rule judges has rows or drafts that are not there.
void check_verify(const VerifyCall& call, Rule rule);
void match_verify(const VerifyCall& call);
void rejection_verify(const VerifyCall& call);
void block_verify(const VerifyCall& call);
void threshold_verify(const VerifyCall& call);
void typical_verify(const VerifyCall& call);

// --- transform_rows.cpp

// rows: [num_sequences]; out: [num_rows, vocab]
void transform_rows(const LogitRows& logits, const SamplingRows& rows,
                    const TransformTables& tables, const RaggedRows& ragged, float* out);

// --- logprobs.cpp

// top_ids, top_log_probs: [R, num_top], num_top <= vocab.
void token_logprobs(const LogitRows& logits, const int32_t* token_ids, int64_t num_top,
                    float* log_probs, int32_t* top_ids, float* top_log_probs);

// --- read_loop.cpp

// Reads `num_bytes` (a multiple of 256) once with every thread, and returns a checksum: what the
// memory can do, for benchmarks to compare with.
uint64_t read_all(const void* data, int64_t num_bytes);

}  // namespace specengine
