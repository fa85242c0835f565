// The Python face of the native ops: checks every tensor, names the argument that is wrong, then
// passes raw pointers on with the interpreter's lock released.
#include <tuple>

#include "core/batch.h"
#include "core/memory.h"
#include "core/ops.h"
#include "python/drafts.h"
#include "python/gil.h"
#include "python/rows.h"
#include "python/tensor_checks.h"
#include "python/threads.h"
#include "python/transforms.h"

void bind_paged_kv_cache(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_suffix_automaton(pybind11::module_& m);
void bind_round_state(pybind11::module_& m, specengine::OpsClass& ops);

namespace specengine {
namespace {

namespace py = pybind11;
using at::Tensor;

Tensor empty_panels(int64_t out_features, int64_t in_features, DType dtype, at::ScalarType type) {
  const int64_t num_bytes = packed_bytes(out_features, in_features, dtype);
  const int64_t count = num_bytes / static_cast<int64_t>(c10::elementSize(type));
  if (num_bytes < kLargeBytes) return at::empty({count}, type);
  void* memory = allocate_large(num_bytes);
  const auto free = [num_bytes](void* data) { free_large(data, num_bytes); };
  return at::from_blob(memory, {count}, free, at::TensorOptions(type));
}

WeightView weight_view(const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight");
  if (weight.dim() != 2 || weight.size(0) < 1 || weight.size(1) < 1) {
    fail("weight: expected [out_features, in_features], got ", shape_of(weight));
  }
  return {weight.data_ptr(), dtype,           weight.size(0), weight.size(1),
          weight.stride(0),  weight.stride(1)};
}

Tensor pack_linear_op(const Tensor& weight, at::ScalarType type) {
  const WeightView view = weight_view(weight);
  const DType dtype = dtype_of(type, "dtype");
  Tensor panels = empty_panels(view.out_features, view.in_features, dtype, type);
  const ReleaseGil released;
  pack_linear(view, dtype, panels.data_ptr(), nullptr);
  return panels;
}

std::tuple<Tensor, Tensor> pack_linear_int8_op(const Tensor& weight) {
  const WeightView view = weight_view(weight);
  Tensor panels = empty_panels(view.out_features, view.in_features, DType::kInt8, at::kChar);
  Tensor scale = at::empty({view.out_features}, at::kFloat);
  const ReleaseGil released;
  pack_linear(view, DType::kInt8, panels.data_ptr(), scale.data_ptr<float>());
  return {panels, scale};
}

// codes [N, K] int8, scale [N, K / 32] fp16; with a minimum of that shape codes are of 4 bits.
Tensor pack_grouped_op(const Tensor& codes, const Tensor& scale,
                       const std::optional<Tensor>& minimum, int64_t bits) {
  if (codes.dim() != 2 || codes.size(0) < 1 || codes.size(1) < 1 || codes.size(1) % kGroupK != 0) {
    fail("weight: expected codes [out_features, in_features] with in_features a multiple of ",
         kGroupK, ", got ", shape_of(codes));
  }
  if (bits != 4 && (bits != 8 || minimum)) fail("weight: codes of ", bits, " bits");
  const int64_t n = codes.size(0), k = codes.size(1);
  const auto halves = [&](const Tensor& tensor, const char* name) {
    dense_input(tensor, name, at::kHalf, {n, k / kGroupK});
    return static_cast<const uint16_t*>(tensor.data_ptr());
  };
  const DType dtype = bits == 8 ? DType::kInt8Group : minimum ? DType::kInt4Min : DType::kInt4;
  dense_input(codes, "codes", at::kChar, {n, k});
  const GroupedView view = {codes.data_ptr<int8_t>(), halves(scale, "scale"),
                            minimum ? halves(*minimum, "minimum") : nullptr, n, k};
  Tensor panels = empty_panels(n, k, dtype, at::kByte);
  const ReleaseGil released;
  pack_grouped(view, dtype, panels.data_ptr());
  return panels;
}

Tensor embed_op(const Tensor& token_ids, const Tensor& positions, const Tensor& token_table,
                const std::optional<Tensor>& position_table) {
  const DType dtype = dtype_of(token_table, "token_table");
  dense_input(token_table, "token_table", token_table.scalar_type(), {-1, -1});
  const int64_t width = token_table.size(1);
  const Tensor ids = small_input(token_ids, "token_ids", at::kInt, {-1});
  const int64_t num_rows = ids.size(0);
  const Tensor places = small_input(positions, "positions", at::kInt, {num_rows});
  check_range(ids.data_ptr<int32_t>(), num_rows, "token_ids", 0, token_table.size(0));
  if (position_table) {
    dense_input(*position_table, "position_table", token_table.scalar_type(), {-1, width});
    check_range(places.data_ptr<int32_t>(), num_rows, "positions", 0, position_table->size(0));
  }
  Tensor out = at::empty({num_rows, width}, at::kFloat);
  const ReleaseGil released;
  embed(ids.data_ptr<int32_t>(), places.data_ptr<int32_t>(), num_rows, width,
        token_table.data_ptr(), position_table ? position_table->data_ptr() : nullptr, dtype,
        out.data_ptr<float>());
  return out;
}

Tensor norm_linear_op(const Tensor& hidden, const Tensor& norm_scale,
                      const std::optional<Tensor>& norm_bias, double eps, const Tensor& panels,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                      int64_t in_features, int64_t out_features, const std::string& activation) {
  const LinearWeight weight = linear_weight(panels, scale, bias, in_features, out_features);
  const NormWeight norm = norm_weight(norm_scale, norm_bias, eps, in_features);
  const Activation kind = activation_of(activation);
  dense_input(hidden, "hidden", at::kFloat, {-1, in_features});
  const int64_t width = check_activated(out_features, kind);
  Tensor out = at::empty({hidden.size(0), width}, at::kFloat);
  const ReleaseGil released;
  linear({hidden.data_ptr<float>(), hidden.size(0), &norm, &weight, kind, nullptr,
          out.data_ptr<float>(), width, out_features});
  return out;
}

Tensor linear_residual_op(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& scale,
                          const std::optional<Tensor>& bias, int64_t in_features,
                          int64_t out_features, const Tensor& residual) {
  const LinearWeight weight = linear_weight(panels, scale, bias, in_features, out_features);
  dense_input(x, "x", at::kFloat, {-1, in_features});
  dense_input(residual, "residual", at::kFloat, {x.size(0), out_features});
  Tensor out = at::empty({x.size(0), out_features}, at::kFloat);
  const ReleaseGil released;
  linear({x.data_ptr<float>(), x.size(0), nullptr, &weight, Activation::kNone,
          residual.data_ptr<float>(), out.data_ptr<float>(), out_features, out_features});
  return out;
}

Tensor head_op(const Tensor& hidden, const Tensor& norm_scale,
               const std::optional<Tensor>& norm_bias, double eps, const Tensor& panels,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
               int64_t in_features, int64_t out_features, int64_t vocab_size,
               const std::optional<Tensor>& token_ids) {
  const Head weights{norm_weight(norm_scale, norm_bias, eps, in_features),
                     linear_weight(panels, scale, bias, in_features, out_features),
                     head_token_ids(token_ids, out_features)};
  check_vocab_size(vocab_size, weights);
  dense_input(hidden, "hidden", at::kFloat, {-1, in_features});
  const int64_t padded = padded_vocab_size(vocab_size);
  Tensor logits = at::empty({hidden.size(0), padded}, at::kFloat);
  const ReleaseGil released;
  head(hidden.data_ptr<float>(), hidden.size(0), weights, vocab_size, logits.data_ptr<float>(),
       padded);
  return logits;
}

std::tuple<Tensor, Tensor> head_draw_op(const Tensor& hidden, const Tensor& norm_scale,
                                        const std::optional<Tensor>& norm_bias, double eps,
                                        const Tensor& panels, const std::optional<Tensor>& scale,
                                        const std::optional<Tensor>& bias, int64_t in_features,
                                        int64_t out_features, int64_t vocab_size,
                                        const std::optional<Tensor>& token_ids,
                                        const RowTensors& rows, const Tensor& positions) {
  const Head weights{norm_weight(norm_scale, norm_bias, eps, in_features),
                     linear_weight(panels, scale, bias, in_features, out_features),
                     head_token_ids(token_ids, out_features)};
  check_vocab_size(vocab_size, weights);
  dense_input(hidden, "hidden", at::kFloat, {-1, in_features});
  const int64_t count = hidden.size(0);
  const RowInputs judged_by(rows, count);
  const IntInput places(positions, "positions", count);
  Tensor tokens = at::empty({count}, at::kInt);
  Tensor error = at::empty({count}, at::kInt);
  const ReleaseGil released;
  head_draw(hidden.data_ptr<float>(), count, weights, vocab_size,
            {*judged_by, places.data(), tokens.data_ptr<int32_t>(), error.data_ptr<int32_t>()});
  return {tokens, error};
}

Tensor norm_qkv_op(const Tensor& hidden, const Tensor& norm_scale,
                   const std::optional<Tensor>& norm_bias, double eps, const Tensor& panels,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                   int64_t in_features, int64_t out_features, const Tensor& positions,
                   const Tensor& kv_slots, const Tensor& kv_cache,
                   const std::optional<Tensor>& rotary, const std::optional<Tensor>& head_norm) {
  const LinearWeight weight = linear_weight(panels, scale, bias, in_features, out_features);
  const NormWeight norm = norm_weight(norm_scale, norm_bias, eps, in_features);
  dense_input(hidden, "hidden", at::kFloat, {-1, in_features});
  const int64_t num_rows = hidden.size(0);
  const DType dtype = dtype_of(kv_cache, "kv_cache");
  dense_input(kv_cache, "kv_cache", kv_cache.scalar_type(), {2, -1, -1, -1, -1});
  const int64_t num_kv_heads = kv_cache.size(2), head_dim = kv_cache.size(4);
  if (kv_cache.size(3) < 1 || head_dim < 1 || num_kv_heads < 1)
    fail("kv_cache: empty ", shape_of(kv_cache));
  const int64_t query_width = out_features - 2 * num_kv_heads * head_dim;
  if (query_width <= 0 || query_width % head_dim != 0) {
    fail("weight: ", out_features, " output features are not (H + 2 * ", num_kv_heads, ") * ",
         head_dim);
  }
  const Tensor places = small_input(positions, "positions", at::kInt, {num_rows});
  const Tensor slots = small_input(kv_slots, "kv_slots", at::kLong, {num_rows});
  check_range(slots.data_ptr<int64_t>(), num_rows, "kv_slots", -1,
              kv_cache.size(1) * kv_cache.size(3));
  KvAppend append{places.data_ptr<int32_t>(),
                  slots.data_ptr<int64_t>(),
                  kv_cache.data_ptr(),
                  dtype,
                  kv_cache.size(1),
                  num_kv_heads,
                  kv_cache.size(3),
                  head_dim,
                  nullptr,
                  0,
                  head_norm_weight(head_norm, head_dim)};
  if (rotary) {
    dense_input(*rotary, "rotary", at::kFloat, {-1, 2, -1});
    if (2 * rotary->size(2) > head_dim)
      fail("rotary: ", rotary->sizes(), " rotates more than ", head_dim, " features");
    check_range(places.data_ptr<int32_t>(), num_rows, "positions", 0, rotary->size(0));
    append.rotary = rotary->data_ptr<float>();
    append.rotary_half = rotary->size(2);
  }
  Tensor query = at::empty({num_rows, query_width / head_dim, head_dim}, at::kFloat);
  const ReleaseGil released;
  norm_qkv(hidden.data_ptr<float>(), num_rows, norm, weight, append, query.data_ptr<float>());
  return query;
}

Tensor paged_attention_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                          const Tensor& slots, const Tensor& q_start, const Tensor& context_len) {
  const DType dtype = dtype_of(kv_cache, "kv_cache");
  dense_input(kv_cache, "kv_cache", kv_cache.scalar_type(), {2, -1, -1, -1, -1});
  const int64_t num_blocks = kv_cache.size(1), num_kv_heads = kv_cache.size(2);
  const int64_t block_size = kv_cache.size(3), head_dim = kv_cache.size(4);
  if (head_dim < 1 || head_dim > kMaxHeadDim || block_size < 1 || num_kv_heads < 1) {
    fail("kv_cache: ", shape_of(kv_cache), " has a size outside 1 … , or a head of more than ",
         kMaxHeadDim);
  }
  dense_input(query, "query", at::kFloat, {-1, -1, head_dim});
  if (query.size(1) < 1 || query.size(1) % num_kv_heads != 0) {
    fail("query: ", query.size(1), " heads are no multiple of ", num_kv_heads, " key/value heads");
  }
  const auto table = matrix<const int32_t>(block_table, "block_table", -1, -1);
  const Tensor table_rows = small_input(slots, "slots", at::kInt, {-1});
  const int64_t num_sequences = table_rows.size(0);
  const Tensor starts = small_input(q_start, "q_start", at::kInt, {num_sequences + 1});
  const Tensor lengths = small_input(context_len, "context_len", at::kInt, {num_sequences});
  const int32_t* start = starts.data_ptr<int32_t>();
  const int32_t* length = lengths.data_ptr<int32_t>();
  check_ragged(num_sequences, start, length, table_rows.data_ptr<int32_t>(), table, query.size(0),
               num_blocks, block_size);
  Tensor out = at::empty({query.size(0), query.size(1) * head_dim}, at::kFloat);
  const AttentionArgs args{query.data_ptr<float>(),
                           kv_cache.data_ptr(),
                           dtype,
                           table.data,
                           table.stride,
                           table_rows.data_ptr<int32_t>(),
                           start,
                           length,
                           query.size(1),
                           num_kv_heads,
                           head_dim,
                           num_blocks,
                           block_size,
                           out.data_ptr<float>()};
  const ReleaseGil released;
  paged_attention(args, num_sequences);
  return out;
}

Tensor filter_rows_op(const Tensor& logits, const RowTensors& rows) {
  const LogitRows target = logit_rows(logits, "logits");
  const RowInputs judged_by(rows, target.num_rows);
  Tensor stats = at::empty({target.num_rows, kNumStats}, at::kFloat);
  const ReleaseGil released;
  filter_rows(target, *judged_by, stats.data_ptr<float>());
  return stats;
}

Tensor transform_rows_op(const Tensor& logits, const RowTensors& judged_by, const Tensor& slots,
                         const Tensor& q_start, const Tensor& positions, const Tensor& wanted,
                         const TransformTensors& transforms) {
  const LogitRows rows = logit_rows(logits, "logits");
  const Tensor slot = small_input(slots, "slots", at::kInt, {-1});
  const int64_t count = slot.size(0);
  const Tensor starts = small_input(q_start, "q_start", at::kInt, {count + 1});
  const Tensor places = small_input(positions, "positions", at::kInt, {-1});
  const Tensor chosen = small_input(wanted, "logit_rows", at::kLong, {rows.num_rows});
  const RaggedRows ragged{count, slot.data_ptr<int32_t>(), starts.data_ptr<int32_t>(),
                          places.data_ptr<int32_t>(), chosen.data_ptr<int64_t>()};
  check_range(ragged.logit_rows, rows.num_rows, "logit_rows", 0,
              std::min<int64_t>(places.size(0), ragged.q_start[count]));
  const TransformTables tables = *transform_tables(transforms);
  const RowInputs by_sequence(judged_by, count);
  Tensor out = at::empty({rows.num_rows, rows.vocab}, at::kFloat);
  const ReleaseGil released;
  transform_rows(rows, *by_sequence, tables, ragged, out.data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor> sample_rows_op(const Tensor& logits, const Tensor& stats,
                                          const RowTensors& rows, const Tensor& positions,
                                          int64_t stream, const Tensor& round_base) {
  const LogitRows target = logit_rows(logits, "logits");
  const int64_t count = target.num_rows;
  const Tensor s = small_input(stats, "stats", at::kFloat, {count, kNumStats});
  const RowInputs judged_by(rows, count);
  const IntInput places(positions, "positions", count), bases(round_base, "round_base", count);
  if (stream < 0 || stream > INT32_MAX) fail("stream: ", stream, " is no stream of specengine.rng");
  Tensor tokens = at::empty({count}, at::kInt);
  Tensor log_probs = at::empty({count}, at::kFloat);
  const ReleaseGil released;
  sample_rows(target, s.data_ptr<float>(), *judged_by, places.data(), static_cast<uint32_t>(stream),
              bases.data(), tokens.data_ptr<int32_t>(), log_probs.data_ptr<float>());
  return {tokens, log_probs};
}

// One binding for every rule's op.
template <Rule rule, void (*verify)(const VerifyCall&)>
void verify_op(const Tensor& logits, const Tensor& stats, const DraftTensors& drafts,
               const RowTensors& rows, const Tensor& is_running, const VerdictTensors& results) {
  DraftInputs judged(drafts);
  if (rule != kRuleMatch) judged.read_law(std::get<4>(drafts));
  const LogitRows target = logit_rows(logits, "logits");
  const Tensor given_stats = small_input(stats, "stats", at::kFloat, {target.num_rows, kNumStats});
  const RowInputs judged_by(rows, judged->count());
  const IntInput running(is_running, "is_running", judged->count());
  const VerifyCall call{target,  given_stats.data_ptr<float>(), *judged, *judged_by,
                        running, verdict(results, *judged)};
  check_verify(call, rule);
  const ReleaseGil released;
  verify(call);
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs_op(const Tensor& logits, const Tensor& token_ids,
                                                     int64_t num_top) {
  const LogitRows rows = logit_rows(logits, "logits");
  const Tensor ids = small_input(token_ids, "token_ids", at::kInt, {rows.num_rows});
  check_range(ids.data_ptr<int32_t>(), rows.num_rows, "token_ids", 0, rows.vocab);
  if (num_top < 0) fail("num_top: ", num_top, " is negative");
  num_top = std::min(num_top, rows.vocab);
  Tensor log_probs = at::empty({rows.num_rows}, at::kFloat);
  Tensor top_ids = at::empty({rows.num_rows, num_top}, at::kInt);
  Tensor top_log_probs = at::empty({rows.num_rows, num_top}, at::kFloat);
  const ReleaseGil released;
  token_logprobs(rows, ids.data_ptr<int32_t>(), num_top, log_probs.data_ptr<float>(),
                 top_ids.data_ptr<int32_t>(), top_log_probs.data_ptr<float>());
  return {log_probs, top_ids, top_log_probs};
}

py::list vocabulary_bits_op(uint64_t seed, uint32_t position, uint32_t stream, uint32_t round_base,
                            int64_t vocab) {
  if (vocab < 0 || vocab > INT32_MAX) fail("vocab: ", vocab, " is outside 0 … 2^31 - 1");
  std::vector<uint32_t> bits(vocab);
  kernels().vocabulary_bits({seed, position, stream, round_base}, vocab, bits.data());
  return py::cast(bits);
}

uint64_t read_all_op(const Tensor& tensor) {
  check_contiguous(tensor, "tensor");
  if (!tensor.device().is_cpu() || tensor.nbytes() % 256 != 0) {
    fail("tensor: expected a CPU tensor of a multiple of 256 bytes, got ", shape_of(tensor));
  }
  const ReleaseGil released;
  return read_all(tensor.data_ptr(), static_cast<int64_t>(tensor.nbytes()));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable",
                           "emulated_tiles"}) {
    if (supports_instruction_set(name)) names.emplace_back(name);
  }
  return names;
}

void set_instruction_set_op(const std::string& name) {
  if (set_instruction_set(name.c_str())) return;
  std::string known = "auto";
  for (const auto& supported : instruction_sets()) known += ", " + supported;
  fail("instruction set: '", name, "' is not one of this processor's: ", known);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["instruction_set"] = kernels().name;
  info["torch"] = TORCH_VERSION;
  info["panel_columns"] = kPanelColumns;
  info["attention_tile"] = kAttentionTile;
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  return info;
}

void bind_ops(OpsClass& ops) {
  ops.def(py::init<int64_t>()).def_property("num_threads", &Threads::count, &Threads::set_count);
  ops.def("pack_linear", on_threads(&pack_linear_op));
  ops.def("pack_linear_int8", on_threads(&pack_linear_int8_op));
  ops.def("pack_grouped", on_threads(&pack_grouped_op));
  ops.def("embed", on_threads(&embed_op));
  ops.def("norm_linear", on_threads(&norm_linear_op));
  ops.def("linear_residual", on_threads(&linear_residual_op));
  ops.def("head", on_threads(&head_op));
  ops.def("head_draw", on_threads(&head_draw_op));
  ops.def("norm_qkv", on_threads(&norm_qkv_op));
  ops.def("paged_attention", on_threads(&paged_attention_op));
  ops.def("filter_rows", on_threads(&filter_rows_op));
  ops.def("transform_rows", on_threads(&transform_rows_op));
  ops.def("sample_rows", on_threads(&sample_rows_op));
  ops.def("match_verify", on_threads(&verify_op<kRuleMatch, match_verify>));
  ops.def("rejection_verify", on_threads(&verify_op<kRuleRejection, rejection_verify>));
  ops.def("block_verify", on_threads(&verify_op<kRuleBlock, block_verify>));
  ops.def("threshold_verify", on_threads(&verify_op<kRuleThreshold, threshold_verify>));
  ops.def("typical_verify", on_threads(&verify_op<kRuleTypical, typical_verify>));
  ops.def("token_logprobs", on_threads(&token_logprobs_op));
  ops.def("read_all", on_threads(&read_all_op));
}

void bind_tools(py::module_& m) {
  m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                         uint32_t k1) { return philox4x32({c0, c1, c2, c3}, k0, k1); });
  m.def("vocabulary_bits", &vocabulary_bits_op);
  m.def("accept_bits", &accept_bits);
  m.def("instruction_sets", &instruction_sets);
  m.def("set_instruction_set", &set_instruction_set_op);
  m.def("build_info", &build_info);
}

}  // namespace
}  // namespace specengine

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native parts of specengine: CPU ops, the paged KV cache manager, the suffix automaton.";
  specengine::OpsClass ops(m, "Ops");
  specengine::bind_ops(ops);
  specengine::bind_tools(m);
  bind_paged_kv_cache(m);
  bind_decoder(m);
  bind_suffix_automaton(m);
  bind_round_state(m, ops);
}
