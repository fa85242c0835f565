#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// Below this many multiply-adds a linear takes about as long as waking a thread.
constexpr int64_t kMinParallelWork = int64_t{1} << 17;
// The same for numbers to normalise or round.
constexpr int64_t kMinParallelRows = int64_t{1} << 14;
// Weight bytes per task: small enough to share evenly, large enough that claiming costs nothing.
constexpr int64_t kTaskBytes = int64_t{1} << 17;

int64_t num_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
// The layer's input rows, normalised, as the kernels want them. Valid until the thread's next call.
const float* pack_rows(const LinearCall& call) {
  static thread_local Scratch<float> words_scratch;
  const LinearWeight& weight = *call.weight;
  const int64_t k = weight.in_features;
  const Kernels& isa = kernels();
  const int64_t row_words = isa.row_words(weight.dtype);
  const int64_t chunk_stride = call.num_rows * row_words;
  float* words = words_scratch.reserve((k + kChunkK - 1) / kChunkK * chunk_stride);
  parallel_for(call.num_rows, call.num_rows * k >= kMinParallelRows, [&](int64_t row) {
    static thread_local Scratch<float> normal_scratch;
    const float* x = call.x + row * k;
    if (call.norm != nullptr) {
      float* normal = normal_scratch.reserve(k);
      isa.norm_row(x, call.norm->weight, call.norm->bias, call.norm->eps, k, normal);
      x = normal;
    }
    isa.pack_row(x, k, weight.dtype, words + row * row_words, chunk_stride);
  });
  return words;
}

LinearArgs linear_args(const LinearCall& call) {
  const LinearWeight& weight = *call.weight;
  return {pack_rows(call),    call.num_rows, weight.panels,   weight.dtype,
          weight.in_features, weight.scale,  weight.bias,     call.residual,
          call.activation,    call.out,      call.out_stride, call.num_columns};
}

bool is_worth_sharing(const LinearCall& call) {
  return call.num_rows * call.num_columns * call.weight->in_features >= kMinParallelWork;
}

// first * cos - second * sin, second * cos + first * sin on the first 2 * half features of a head.
void rotate(const float* table, int64_t half, float* head) {
  const float* cosine = table;
  const float* sine = table + half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i];
    const float second = head[half + i];
    head[i] = first * cosine[i] - second * sine[i];
    head[half + i] = second * cosine[i] + first * sine[i];
  }
}

void append_row(const float* projected, int64_t slot, int64_t part, const KvAppend& append) {
  const int64_t block = slot / append.block_size;
  const int64_t offset = slot % append.block_size;
  for (int64_t head = 0; head < append.num_kv_heads; ++head) {
    const int64_t at =
        (((part * append.num_blocks + block) * append.num_kv_heads + head) * append.block_size +
         offset) *
        append.head_dim;
    for (int64_t d = 0; d < append.head_dim; ++d) {
      store_float(append.kv_cache, append.dtype, at + d, projected[head * append.head_dim + d]);
    }
  }
}

}  // namespace

void embed(const int32_t* token_ids, const int32_t* positions, int64_t num_rows, int64_t width,
           const void* token_table, const void* position_table, DType dtype, float* out) {
  parallel_for(num_rows, num_rows * width >= kMinParallelWork, [&](int64_t row) {
    const int64_t token_at = token_ids[row] * width;
    for (int64_t d = 0; d < width; ++d)
      out[row * width + d] = load_float(token_table, dtype, token_at + d);
    if (position_table == nullptr) return;
    const int64_t position_at = positions[row] * width;
    for (int64_t d = 0; d < width; ++d)
      out[row * width + d] += load_float(position_table, dtype, position_at + d);
  });
}

void linear(const LinearCall& call) {
  const LinearArgs args = linear_args(call);
  const int64_t panels = num_panels(call.num_columns);
  const int64_t panel_bytes =
      packed_elements(kPanelColumns, args.k, args.dtype) * element_size(args.dtype);
  // More rows make a panel more work; never fewer than one panel, never so many that threads idle.
  const int64_t wanted =
      std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, panel_bytes * call.num_rows));
  const int64_t per_task = std::min(wanted, std::max<int64_t>(1, panels / num_threads()));
  const Kernels& isa = kernels();
  parallel_for((panels + per_task - 1) / per_task, is_worth_sharing(call), [&](int64_t task) {
    const int64_t end = std::min(panels, (task + 1) * per_task);
    for (int64_t panel = task * per_task; panel < end; ++panel) isa.linear_panel(args, panel);
  });
}

void linear_tiles(const LinearCall& call, TileConsumer consume, void* context) {
  const LinearArgs whole = linear_args(call);
  const int64_t num_tiles = (call.num_columns + kTileColumns - 1) / kTileColumns;
  const Kernels& isa = kernels();
  parallel_for(num_tiles, is_worth_sharing(call), [&](int64_t index) {
    static thread_local Scratch<float> tile_scratch;
    LinearArgs args = whole;
    args.residual = nullptr;
    args.out = tile_scratch.reserve(call.num_rows * kTileColumns);
    args.out_stride = kTileColumns;
    args.first_column = index * kTileColumns;
    args.num_columns = std::min(args.first_column + kTileColumns, call.num_columns);
    constexpr int64_t kTilePanels = kTileColumns / kPanelColumns;
    const int64_t end = num_panels(args.num_columns);
    for (int64_t panel = index * kTilePanels; panel < end; ++panel) isa.linear_panel(args, panel);
    consume(context, args.first_column, args.num_columns - args.first_column, args.out);
  });
}

void head(const float* hidden, int64_t num_rows, const NormWeight& norm, const LinearWeight& weight,
          int64_t vocab_size, float* logits, int64_t padded_vocab_size) {
  linear({hidden, num_rows, &norm, &weight, Activation::kNone, nullptr, logits, padded_vocab_size,
          vocab_size});
  for (int64_t row = 0; row < num_rows; ++row) {
    std::fill(logits + row * padded_vocab_size + vocab_size, logits + (row + 1) * padded_vocab_size,
              -std::numeric_limits<float>::infinity());
  }
}

void norm_qkv(const float* hidden, int64_t num_rows, const NormWeight& norm,
              const LinearWeight& weight, const KvAppend& append, float* query) {
  static thread_local Scratch<float> scratch;
  const int64_t width = weight.out_features;
  float* projected = scratch.reserve(num_rows * width);
  linear({hidden, num_rows, &norm, &weight, Activation::kNone, nullptr, projected, width, width});
  const int64_t kv_width = append.num_kv_heads * append.head_dim;
  const int64_t query_width = width - 2 * kv_width;
  const Kernels& isa = kernels();
  parallel_for(num_rows, num_rows * width >= kMinParallelWork, [&](int64_t row) {
    float* values = projected + row * width;
    if (append.head_norm != nullptr) {
      for (int64_t at = 0; at < query_width + kv_width; at += append.head_dim) {
        const float* weight = append.head_norm + (at < query_width ? 0 : append.head_dim);
        isa.norm_row(values + at, weight, nullptr, norm.eps, append.head_dim, values + at);
      }
    }
    if (append.rotary != nullptr) {
      const float* table = append.rotary + append.positions[row] * 2 * append.rotary_half;
      for (int64_t at = 0; at < query_width + kv_width; at += append.head_dim) {
        rotate(table, append.rotary_half, values + at);
      }
    }
    std::memcpy(query + row * query_width, values, sizeof(float) * query_width);
    const int64_t slot = append.kv_slots[row];
    if (slot < 0) return;
    append_row(values + query_width, slot, 0, append);
    append_row(values + query_width + kv_width, slot, 1, append);
  });
}

}  // namespace specengine
