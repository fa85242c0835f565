#include <algorithm>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// About as many rows of one sequence does a task take: enough to reuse a tile, few enough to share
// a long prompt.
constexpr int64_t kRowsPerTask = kMaxSharedQueries;
// Multiply-adds below which waking a thread does not pay.
constexpr int64_t kMinParallelWork = int64_t{1} << 16;
// Tiles of a context below which it is not shared out: its merging would cost what it saves.
constexpr int64_t kMinSharedTiles = 5;
// Parts of contexts for each thread.
constexpr int64_t kPartsPerThread = 4;

int64_t num_rows(const AttentionArgs& args, int64_t sequence) {
  return args.q_start[sequence + 1] - args.q_start[sequence];
}

int64_t num_tiles(const AttentionArgs& args, int64_t sequence) {
  return (args.context_len[sequence] + kAttentionTile - 1) / kAttentionTile;
}

struct BatchShape {
  int64_t num_sequences, most_rows = 0, most_tiles = 0, work = 0;
};

void attend(const AttentionArgs& args, int64_t b, int64_t kv_head, int64_t begin, int64_t end,
            const AttentionPart& part) {
  thread_local Scratch<float> scratch;
  kernels().attention(args, b, kv_head, begin, end, part,
                      scratch.reserve(attention_scratch(args.head_dim)));
}

// Every task some rows of one sequence and head, and their whole context.
void attend_by_rows(const AttentionArgs& args, const BatchShape& shape) {
  // Whole visits: a visit of a few rows would pay for a tile's keys what one of many does.
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t visit_rows = std::max<int64_t>(1, kMaxSharedQueries / group);
  const int64_t task_rows = kRowsPerTask / visit_rows * visit_rows;
  const int64_t most_chunks = (shape.most_rows + task_rows - 1) / task_rows;
  // Long rows first: the last chunk of a prompt sees the most context.
  const int64_t per_sequence = most_chunks * args.num_kv_heads;
  parallel_for(shape.num_sequences * per_sequence, shape.work >= kMinParallelWork,
               [&](int64_t task) {
                 const int64_t b = task / per_sequence;
                 const int64_t chunk = most_chunks - 1 - task % per_sequence / args.num_kv_heads;
                 const int64_t begin = args.q_start[b] + chunk * task_rows;
                 const int64_t end = std::min<int64_t>(begin + task_rows, args.q_start[b + 1]);
                 if (begin < end) attend(args, b, task % args.num_kv_heads, begin, end, {});
               });
}

// How many parts a context is shared out in, 1: not at all. Where there are too few heads to keep
// the threads evenly at work, as those that few key/value heads leave.
int64_t num_parts(const AttentionArgs& args, const BatchShape& shape) {
  const int64_t threads = num_threads();
  const int64_t queries = shape.most_rows * (args.num_heads / args.num_kv_heads);
  if (threads == 1 || queries > kMaxSharedQueries || shape.most_tiles < kMinSharedTiles) return 1;
  const int64_t tasks = shape.num_sequences * args.num_kv_heads;
  const int64_t turns = (tasks + threads - 1) / threads;
  if (10 * tasks >= 9 * turns * threads) return 1;
  return std::min(shape.most_tiles, (kPartsPerThread * threads + tasks - 1) / tasks);
}

// Every task some tiles of a context; what they found is merged at the end.
void attend_by_tiles(const AttentionArgs& args, const BatchShape& shape, int64_t parts) {
  static thread_local Scratch<float> scratch;
  const int64_t queries = shape.most_rows * (args.num_heads / args.num_kv_heads);
  const int64_t stride = shape.most_tiles * queries * attention_part_words(args.head_dim);
  const int64_t heads = shape.num_sequences * args.num_kv_heads;
  float* found = scratch.reserve(heads * stride);
  const auto run = [&](int64_t head, int64_t begin, int64_t end) {
    const int64_t b = head / args.num_kv_heads;
    if (num_rows(args, b) == 0) return;
    attend(args, b, head % args.num_kv_heads, args.q_start[b], args.q_start[b + 1],
           {found + head * stride, begin, end});
  };
  parallel_for(heads * parts, true, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    const int64_t tiles = num_tiles(args, head / args.num_kv_heads);
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    if (begin < end) run(head, begin, end);
  });
  parallel_for(heads, true, [&](int64_t head) { run(head, 0, 0); });
}

}  // namespace

void paged_attention(const AttentionArgs& args, int64_t num_sequences) {
  BatchShape shape{num_sequences};
  for (int64_t b = 0; b < num_sequences; ++b) {
    shape.most_rows = std::max(shape.most_rows, num_rows(args, b));
    shape.most_tiles = std::max(shape.most_tiles, num_tiles(args, b));
    shape.work += num_rows(args, b) * args.context_len[b] * args.num_heads * args.head_dim;
  }
  if (const int64_t parts = num_parts(args, shape); parts > 1) {
    attend_by_tiles(args, shape, parts);
  } else {
    attend_by_rows(args, shape);
  }
}

}  // namespace specengine
