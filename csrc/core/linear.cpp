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

// Packed rows that stay in a core's second cache while one panel after the other meets them.
constexpr int64_t kGroupBytes = int64_t{384} << 10;

int64_t num_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

int64_t part_begin(int64_t count, int64_t num_parts, int64_t part) {
  return count * part / num_parts;
}

// A layer's input rows, normalised, as the kernels want them, in groups that follow each other.
// Valid until the thread's next call.
class PackedRows {
 public:
  PackedRows(const LinearCall& call, bool in_groups) : call_(call) {
    static thread_local Scratch<float> words_scratch;
    const LinearWeight& weight = *call.weight;
    const int64_t k = weight.in_features;
    const Kernels& isa = kernels();
    const int64_t row_bytes =
        isa.row_layout(weight.dtype, call.num_rows).row_words(k) * int64_t{sizeof(float)};
    const int64_t group_rows = std::max<int64_t>(1, kGroupBytes / row_bytes);
    const int64_t wanted = (call.num_rows + group_rows - 1) / group_rows;
    const int64_t most = in_groups ? call.num_rows / isa.min_group_rows : 1;
    num_groups_ = std::max<int64_t>(1, std::min(wanted, most));
    for (int64_t group = 0; group < num_groups_; ++group) {
      group_words_ = std::max(group_words_, layout(group).size(num_rows(group), k));
    }
    float* words = words_scratch.reserve(num_groups_ * group_words_);
    words_ = words;
    parallel_for(call.num_rows, call.num_rows * k >= kMinParallelRows, [&](int64_t row) {
      static thread_local Scratch<float> normal_scratch;
      const float* x = call.x + row * k;
      if (call.norm != nullptr) {
        float* normal = normal_scratch.reserve(k);
        isa.norm_row(x, call.norm->weight, call.norm->bias, call.norm->eps, k, normal);
        x = normal;
      }
      const int64_t group = ((row + 1) * num_groups_ - 1) / call.num_rows;
      const RowLayout layout = this->layout(group);
      isa.pack_row(x, k, weight.dtype,
                   words + group * group_words_ + layout.begin(row - begin(group), k),
                   layout.stride());
    });
  }

  int64_t num_groups() const { return num_groups_; }
  int64_t num_rows(int64_t group) const { return begin(group + 1) - begin(group); }

  // What the kernels compute of a group's rows, for the calling thread.
  LinearArgs args(int64_t group) const {
    static thread_local Scratch<float> waiting_scratch;
    const LinearWeight& weight = *call_.weight;
    const int64_t first = begin(group);
    const float* residual =
        call_.residual == nullptr ? nullptr : call_.residual + first * call_.num_columns;
    return {words_ + group * group_words_,
            num_rows(group),
            weight.panels,
            weight.dtype,
            weight.in_features,
            weight.scale,
            weight.bias,
            residual,
            call_.activation,
            call_.out + first * call_.out_stride,
            call_.out_stride,
            call_.num_columns,
            waiting_scratch.reserve(kWaitingSums)};
  }

 private:
  int64_t begin(int64_t group) const { return part_begin(call_.num_rows, num_groups_, group); }
  RowLayout layout(int64_t group) const {
    return kernels().row_layout(call_.weight->dtype, num_rows(group));
  }

  const LinearCall& call_;
  const float* words_;
  int64_t num_groups_;
  int64_t group_words_ = 0;
};

// Pieces of a weight, panels or tiles, that follow each other in memory, in parts: most of them in
// one part for each thread, which so reads on where it stopped, as the processor expects when it
// reads ahead; the rest, for who comes first, in parts of about kTaskBytes, or less where many rows
// make a piece more work, or where each thread would not find two of them.
class Parts {
 public:
  // piece_bytes: weight bytes of a piece, for each row that meets them
  Parts(int64_t num_pieces, int64_t piece_bytes, int64_t num_rows)
      : num_pieces_(num_pieces),
        num_long_(num_threads()),
        long_size_(num_pieces * 3 / 4 / num_long_) {
    if (long_size_ == 0) num_long_ = 0;
    const int64_t rest = num_pieces - num_long_ * long_size_;
    const int64_t work = std::max<int64_t>(1, piece_bytes * num_rows);
    const int64_t even_size = rest / (2 * num_threads());
    const int64_t short_size = std::max<int64_t>(1, std::min(kTaskBytes / work, even_size));
    num_short_ = (rest + short_size - 1) / short_size;
  }

  int64_t count() const { return num_long_ + num_short_; }

  int64_t begin(int64_t part) const {
    if (part <= num_long_) return part * long_size_;
    const int64_t first = num_long_ * long_size_;
    return first + part_begin(num_pieces_ - first, num_short_, part - num_long_);
  }

 private:
  int64_t num_pieces_, num_long_, long_size_, num_short_;
};

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
  const PackedRows rows(call, true);
  const int64_t bytes = panel_bytes(call.weight->in_features, call.weight->dtype);
  const Parts parts(num_panels(call.num_columns), bytes, rows.num_rows(0));
  const Kernels& isa = kernels();
  parallel_for(rows.num_groups() * parts.count(), is_worth_sharing(call), [&](int64_t task) {
    const LinearArgs args = rows.args(task / parts.count());
    const int64_t part = task % parts.count();
    isa.linear_panels(args, parts.begin(part), parts.begin(part + 1));
  });
}

void linear_tiles(const LinearCall& call, TileConsumer consume, void* context) {
  const PackedRows rows(call, false);
  const LinearWeight& weight = *call.weight;
  constexpr int64_t kTilePanels = kTileColumns / kPanelColumns;
  const int64_t num_tiles = (call.num_columns + kTileColumns - 1) / kTileColumns;
  const int64_t tile_bytes = kTilePanels * panel_bytes(weight.in_features, weight.dtype);
  const Parts parts(num_tiles, tile_bytes, call.num_rows);
  const Kernels& isa = kernels();
  parallel_for(parts.count(), is_worth_sharing(call), [&](int64_t part) {
    static thread_local Scratch<float> tile_scratch;
    LinearArgs args = rows.args(0);
    args.residual = nullptr;
    args.out = tile_scratch.reserve(call.num_rows * kTileColumns);
    args.out_stride = kTileColumns;
    for (int64_t tile = parts.begin(part); tile < parts.begin(part + 1); ++tile) {
      args.first_column = tile * kTileColumns;
      args.num_columns = std::min(args.first_column + kTileColumns, call.num_columns);
      isa.linear_panels(args, tile * kTilePanels, num_panels(args.num_columns));
      consume(context, args.first_column, args.num_columns - args.first_column, args.out);
    }
  });
}

int64_t Head::num_rows(int64_t vocab_size) const {
  if (has_all_tokens()) return vocab_size;
  return std::ranges::lower_bound(token_ids, vocab_size) - token_ids.begin();
}

void head(const float* hidden, int64_t num_rows, const Head& weights, int64_t vocab_size,
          float* logits, int64_t padded_vocab_size) {
  constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
  const LinearCall call{hidden,          num_rows,          &weights.norm,
                        &weights.weight, Activation::kNone, nullptr,
                        logits,          padded_vocab_size, weights.num_rows(vocab_size)};
  if (weights.has_all_tokens()) {
    linear(call);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::fill(logits + row * padded_vocab_size + vocab_size,
                logits + (row + 1) * padded_vocab_size, kNegativeInfinity);
    }
    return;
  }
  std::fill_n(logits, num_rows * padded_vocab_size, kNegativeInfinity);
  if (call.num_columns == 0) return;
  struct Spread {
    const LinearCall& call;
    Ints token_ids;
  } spread{call, weights.token_ids};
  linear_tiles(
      call,
      [](void* context, int64_t first, int64_t count, const float* tile) {
        const auto& [call, token_ids] = *static_cast<const Spread*>(context);
        for (int64_t row = 0; row < call.num_rows; ++row) {
          float* out = call.out + row * call.out_stride;
          for (int64_t at = 0; at < count; ++at)
            out[token_ids[first + at]] = tile[row * kTileColumns + at];
        }
      },
      &spread);
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
