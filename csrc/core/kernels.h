// The functions that exist once per instruction set. Each works on one panel, row or tile, is
// single-threaded, and its results depend on nothing but its own row and weights.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "core/philox.h"

namespace specengine {

// Weights are packed in panels of 64 output columns, one contiguous stream each: [k / depth, 64,
// depth], `depth` weights of a column beside each other for products that add pairs or quads;
// padded with zeros to whole panels and steps. int8 weights are stored with 128 added.
constexpr int kPanelColumns = 64;
constexpr int depth_of(DType dtype) {
  return dtype == DType::kInt8 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}
// Weights by group (specengine.kernels.types.grouped) share a scale, and kInt4Min a minimum, in
// groups of kGroupK along K. A panel is its groups one after the other, each 64 fp16 scales, for
// kInt4Min 64 fp16 minima, and codes:
//   4 bits [kGroupK / 8, 64, 4] bytes, of eight k of a column the first four in the low halves and
//          the others in the high ones
//   8 bits [kGroupK / 4, 64, 4] bytes
// Codes are stored with code_offset added, so that none has a sign. kInt4Min's are so already: as
// many scales more in its minimum centre them.
// Rows meet them as integers of 23 bits, with a scale for each group of kGroupK: a group's sum is
// then exact.
constexpr int kGroupK = 32;
constexpr bool is_grouped(DType dtype) { return dtype > DType::kInt8; }
constexpr int code_offset(DType dtype) { return dtype == DType::kInt8Group ? 128 : 8; }
constexpr int64_t group_header_bytes(DType dtype) {
  return 2 * kPanelColumns * (dtype == DType::kInt4Min ? 2 : 1);
}
constexpr int64_t group_bytes(DType dtype) {
  const int64_t codes = kGroupK * kPanelColumns;
  return group_header_bytes(dtype) + (dtype == DType::kInt8Group ? codes : codes / 2);
}
constexpr int64_t panel_bytes(int64_t k, DType dtype) {
  if (is_grouped(dtype)) return k / kGroupK * group_bytes(dtype);
  const int64_t depth = depth_of(dtype);
  return (k + depth - 1) / depth * depth * kPanelColumns * element_size(dtype);
}
// An output element is the sum, in order, of sequential sums over K chunks of this length, or over
// groups of weights by group. Rows that meet int8 weights are rounded to int8 chunk by chunk; the
// sum over a chunk is then exact.
constexpr int kChunkK = 128;
// Rows that share one pass over a panel.
constexpr int kMaxPassRows = 256;
// Floats for sums that wait while other panels are multiplied: as many as stay in the second cache.
constexpr int64_t kWaitingSums = int64_t{1} << 17;
// Attention partials cover KV tiles that start at absolute multiples of this.
constexpr int kAttentionTile = 128;
constexpr int kMaxHeadDim = 256;
// Query vectors (rows times heads of a group) that share one visit of a tile.
constexpr int kMaxSharedQueries = 32;
// Floats that one call of Kernels::attention needs: queries, outputs, sums and weights, 32 keys,
// 16 more and a tile of values.
constexpr int64_t attention_scratch(int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  return kMaxSharedQueries * (3 * padded + kAttentionTile) + (32 + 16 + kAttentionTile) * padded;
}
// Groups whose maxima bound the k-th largest from below.
constexpr int kNumMaximaGroups = 512;
// Bins of 1/32 nat below the maximum; the last holds the tail.
constexpr int kNumMassBins = 1024;
constexpr float kMassBinsPerNat = 32.0f;

// kSwiglu makes one column of two: silu(column 2 i) * column 2 i + 1.
enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSwiglu };
constexpr int64_t activated_columns(int64_t columns, Activation activation) {
  return activation == Activation::kSwiglu ? columns / 2 : columns;
}

// Rows enter a linear as `pack_row` leaves them, in stacks: [stacks, pieces, height, words]. A
// piece has `k` elements, and a word is a float, a pair of bf16 or a quad of int8, as the
// instruction set likes to multiply with the weights' type. The last stack may hold spare rows,
// whatever they are.
struct RowLayout {
  int k, words;
  int64_t height;

  int64_t num_pieces(int64_t row_k) const { return (row_k + k - 1) / k; }
  int64_t row_words(int64_t row_k) const { return num_pieces(row_k) * words; }
  // The first piece of a row; those that follow are `stride()` words apart.
  int64_t begin(int64_t row, int64_t row_k) const {
    return row / height * height * row_words(row_k) + row % height * words;
  }
  int64_t stride() const { return height * words; }
  // Words of so many rows.
  int64_t size(int64_t num_rows, int64_t row_k) const {
    return (num_rows + height - 1) / height * height * row_words(row_k);
  }
};

struct LinearArgs {
  const float* x;
  int64_t num_rows;
  const void* panels;
  DType dtype;
  int64_t k;
  const float* scale;     // [num_columns] of int8 weights, else null
  const float* bias;      // [num_columns] or null
  const float* residual;  // [num_rows, num_columns] or null; not with kSwiglu
  Activation activation;
  float* out;  // [num_rows, stride out_stride]
  int64_t out_stride;
  int64_t num_columns;       // columns of the weight that are computed
  float* waiting;            // [kWaitingSums]
  int64_t first_column = 0;  // the column that out[row][0] holds
};

struct AttentionArgs {
  const float* query;  // [T, H, head_dim]
  const void* kv;      // [2, N, Hkv, block_size, head_dim]
  DType dtype;
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* slots;
  const int32_t* q_start;
  const int32_t* context_len;
  int64_t num_heads, num_kv_heads, head_dim, num_blocks, block_size;
  float* out;  // [T, H * head_dim]
};

// What a call of Kernels::attention does: all of it (the default), or, where few queries see a long
// context, what they find in tiles begin … end - 1 of it, and at last, with no tile, the merging of
// all that was found. Bits are those of a call that does all.
struct AttentionPart {
  // [tiles, queries, attention_part_words]: of a row's tile the largest score, the normaliser, and
  // the weighted values. The queries are one visit's: at most kMaxSharedQueries.
  float* found = nullptr;
  int64_t begin = 0, end = 0;
};
constexpr int64_t attention_part_words(int64_t head_dim) { return 16 + (head_dim + 15) / 16 * 16; }

// One row of logits as the verification ops see it.
struct RowView {
  const float* logits;
  int64_t vocab;
  float divisor;    // temperature, 1 for a greedy row
  float threshold;  // keep z / T >= threshold
  float log_normaliser;
};

struct RowMaximum {
  float value;
  bool has_nan;
};

struct RaceResult {
  int32_t token;
  float score;  // -inf when nothing could win
};

struct Kernels {
  const char* name;
  // With fewer rows than this a panel takes longer to come from memory than to be multiplied.
  int64_t min_group_rows;
  // LayerNorm; without a bias RMSNorm. `out` may be `x`.
  void (*norm_row)(const float* x, const float* weight, const float* bias, float eps, int64_t size,
                   float* out);
  RowLayout (*row_layout)(DType weights, int64_t num_rows);
  // Pieces of the row are `stride` words apart.
  void (*pack_row)(const float* x, int64_t k, DType weights, float* out, int64_t stride);
  // Panels begin … end - 1, which follow each other in memory.
  void (*linear_panels)(const LinearArgs& args, int64_t begin, int64_t end);
  // scratch: [attention_scratch(head_dim)]
  void (*attention)(const AttentionArgs& args, int64_t sequence, int64_t kv_head, int64_t row_begin,
                    int64_t row_end, const AttentionPart& part, float* scratch);
  RowMaximum (*row_maximum)(const RowView& row);
  // Sum of exp(z / T - maximum) over the kept tokens.
  double (*row_sum_exp)(const RowView& row, float maximum);
  // -sum p log p over the kept tokens.
  double (*row_entropy)(const RowView& row);
  // group_maxima: [kNumMaximaGroups]; the maxima of disjoint groups of the row.
  void (*row_group_maxima)(const RowView& row, float* group_maxima);
  // Kept values >= low, in index order; returns how many were written to `values`.
  int64_t (*row_collect)(const RowView& row, float low, float* values);
  // Mass exp(z / T - maximum) of the kept tokens by bin of distance from the maximum.
  void (*row_mass_bins)(const RowView& row, float maximum, double* mass);
  int64_t (*row_collect_bin)(const RowView& row, float maximum, int bin, float* values);
  int32_t (*row_argmax)(const RowView& row);
  // Gumbel race over the kept tokens of `target`; with `draft`, over log max(p - q, 0); `excluded`
  // (or -1) cannot win.
  RaceResult (*race)(const RowView& target, const RowView* draft, int64_t excluded,
                     const NoiseKey& key);
  // Sum of max(p - q, 0) over the kept tokens of `target`.
  double (*residual_mass)(const RowView& target, const RowView& draft);
  // One tile of a row, token ids `first_id` (a multiple of 128) and up: the largest z / T, or with
  // a key the winner of the race. Nothing below `best` need be found.
  RaceResult (*draw_tile)(const RowView& tile, int64_t first_id, const NoiseKey* key, float best);
  void (*vocabulary_bits)(const NoiseKey& key, int64_t vocab, uint32_t* bits);
  // A checksum of `num_bytes`, a multiple of 256.
  uint64_t (*read_block)(const void* data, int64_t num_bytes);
};

#if defined(__x86_64__)
extern const Kernels kAvx512AmxKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;
// avx512_amx with a model of its tiles: much slower than kPortableKernels, for tests.
extern const Kernels kEmulatedTilesKernels;

// The kernels in use: the best the processor has, unless SPECENGINE_INSTRUCTION_SET names others or
// set_instruction_set chose some.
const Kernels& kernels();
// "auto", "avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable" or
// "emulated_tiles"; false when unknown or not supported here.
bool set_instruction_set(const char* name);
bool supports_instruction_set(const char* name);

}  // namespace specengine
