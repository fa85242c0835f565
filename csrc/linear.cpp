#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>

#include "ops.h"
#include "scratch.h"
#include "thread_pool.h"

namespace specengine {
namespace {

// Below this many multiply-adds a linear takes about as long as waking a thread.
constexpr int64_t kMinParallelWork = int64_t{1} << 17;
// Weight bytes per task: small enough to share evenly, large enough that claiming costs nothing.
constexpr int64_t kTaskBytes = int64_t{1} << 17;

int64_t num_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
int64_t padded_k(int64_t k, DType dtype) { return dtype == DType::kBFloat16 ? (k + 1) / 2 * 2 : k; }

template <class T>
void pack_panels(const T* weight, int64_t n, int64_t k, DType dtype, T* out) {
  const int64_t rows = padded_k(k, dtype);
  const bool is_paired = dtype == DType::kBFloat16;
  parallel_for(num_panels(n), n * k >= kMinParallelWork, [&](int64_t panel) {
    T* base = out + panel * rows * kPanelColumns;
    std::memset(static_cast<void*>(base), 0, sizeof(T) * rows * kPanelColumns);
    const int64_t columns = std::min<int64_t>(kPanelColumns, n - panel * kPanelColumns);
    for (int64_t column = 0; column < columns; ++column) {
      const T* source = weight + (panel * kPanelColumns + column) * k;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at =
            is_paired ? (i / 2 * kPanelColumns + column) * 2 + i % 2 : i * kPanelColumns + column;
        base[at] = source[i];
      }
    }
  });
}

// The layer's input rows: normalised or copied where the panels need it padded, else in place.
const float* prepare_rows(const LinearCall& call, int64_t stride, Scratch<float>& scratch) {
  const int64_t k = call.weight->in_features;
  if (call.norm == nullptr && stride == k) return call.x;
  float* rows = scratch.reserve(call.num_rows * stride);
  const Kernels& isa = kernels();
  parallel_for(call.num_rows, call.num_rows * k >= kMinParallelWork, [&](int64_t row) {
    float* out = rows + row * stride;
    if (call.norm != nullptr) {
      isa.layer_norm(call.x + row * k, call.norm->weight, call.norm->bias, call.norm->eps, k, out);
    } else {
      std::memcpy(out, call.x + row * k, sizeof(float) * k);
    }
    std::fill(out + k, out + stride, 0.0f);
  });
  return rows;
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

int64_t packed_elements(int64_t out_features, int64_t in_features, DType dtype) {
  return num_panels(out_features) * kPanelColumns * padded_k(in_features, dtype);
}

void pack_linear(const void* weight, DType dtype, int64_t out_features, int64_t in_features,
                 void* panels) {
  if (dtype == DType::kFloat32) {
    pack_panels(static_cast<const float*>(weight), out_features, in_features, dtype,
                static_cast<float*>(panels));
  } else {
    pack_panels(static_cast<const uint16_t*>(weight), out_features, in_features, dtype,
                static_cast<uint16_t*>(panels));
  }
}

void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)num_bytes;
#endif
}

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
  static thread_local Scratch<float> scratch;
  const LinearWeight& weight = *call.weight;
  const int64_t stride = padded_k(weight.in_features, weight.dtype);
  const LinearArgs args{prepare_rows(call, stride, scratch),
                        stride,
                        call.num_rows,
                        weight.panels,
                        weight.dtype,
                        weight.in_features,
                        weight.bias,
                        call.residual,
                        call.activation,
                        call.out,
                        call.out_stride,
                        call.num_columns};
  const int64_t panels = num_panels(call.num_columns);
  const int64_t panel_bytes = stride * kPanelColumns * element_size(weight.dtype);
  // More rows make a panel more work; never fewer than one panel, never so many that threads idle.
  const int64_t wanted =
      std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, panel_bytes * call.num_rows));
  const int64_t per_task = std::min(wanted, std::max<int64_t>(1, panels / num_threads()));
  const bool is_parallel = call.num_rows * panels * kPanelColumns * stride >= kMinParallelWork;
  const Kernels& isa = kernels();
  parallel_for((panels + per_task - 1) / per_task, is_parallel, [&](int64_t task) {
    const int64_t end = std::min(panels, (task + 1) * per_task);
    for (int64_t panel = task * per_task; panel < end; ++panel) isa.linear_panel(args, panel);
  });
}

void linear_tiles(const LinearCall& call, TileConsumer consume, void* context) {
  static thread_local Scratch<float> scratch;
  const LinearWeight& weight = *call.weight;
  const int64_t stride = padded_k(weight.in_features, weight.dtype);
  const float* rows = prepare_rows(call, stride, scratch);
  const int64_t num_tiles = (call.num_columns + kTileColumns - 1) / kTileColumns;
  const bool is_parallel = call.num_rows * num_tiles * kTileColumns * stride >= kMinParallelWork;
  const Kernels& isa = kernels();
  parallel_for(num_tiles, is_parallel, [&](int64_t index) {
    static thread_local Scratch<float> tile_scratch;
    float* tile = tile_scratch.reserve(call.num_rows * kTileColumns);
    const int64_t first = index * kTileColumns;
    const int64_t end = std::min(first + kTileColumns, call.num_columns);
    const LinearArgs args{
        rows,        stride,  call.num_rows,   weight.panels, weight.dtype, weight.in_features,
        weight.bias, nullptr, call.activation, tile,          kTileColumns, end,
        first};
    for (int64_t column = first; column < end; column += kPanelColumns) {
      isa.linear_panel(args, column / kPanelColumns);
    }
    consume(context, first, end - first, tile);
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
  parallel_for(num_rows, num_rows * width >= kMinParallelWork, [&](int64_t row) {
    float* values = projected + row * width;
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
