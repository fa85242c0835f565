#include <algorithm>

#include "core/ops.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace specengine {
namespace {

// Rows of one sequence that a task takes: enough to reuse a tile, few enough to share a long
// prompt.
constexpr int64_t kRowsPerTask = kMaxSharedQueries;
// Multiply-adds below which waking a thread does not pay.
constexpr int64_t kMinParallelWork = int64_t{1} << 16;

int64_t num_chunks(const AttentionArgs& args, int64_t sequence) {
  return (args.q_start[sequence + 1] - args.q_start[sequence] + kRowsPerTask - 1) / kRowsPerTask;
}

}  // namespace

void paged_attention(const AttentionArgs& args, int64_t num_sequences) {
  int64_t most_chunks = 0;
  int64_t work = 0;
  for (int64_t b = 0; b < num_sequences; ++b) {
    most_chunks = std::max(most_chunks, num_chunks(args, b));
    const int64_t rows = args.q_start[b + 1] - args.q_start[b];
    work += rows * args.context_len[b] * args.num_heads * args.head_dim;
  }
  const Kernels& isa = kernels();
  // Long rows first: the last chunk of a prompt sees the most context.
  const int64_t per_sequence = most_chunks * args.num_kv_heads;
  parallel_for(num_sequences * per_sequence, work >= kMinParallelWork, [&](int64_t task) {
    const int64_t b = task / per_sequence;
    const int64_t chunk = most_chunks - 1 - task % per_sequence / args.num_kv_heads;
    if (chunk >= num_chunks(args, b)) return;
    const int64_t begin = args.q_start[b] + chunk * kRowsPerTask;
    const int64_t end = std::min<int64_t>(begin + kRowsPerTask, args.q_start[b + 1]);
    thread_local Scratch<float> scratch;
    isa.attention(args, b, task % args.num_kv_heads, begin, end,
                  scratch.reserve(attention_scratch(args.head_dim)));
  });
}

}  // namespace specengine
