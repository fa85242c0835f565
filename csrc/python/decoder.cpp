// The Python face of DecoderRunner: weights are checked once, when an op is added; the tensors of a
// batch on every call, and what is in them by the core.
#include "core/decoder.h"

#include <algorithm>
#include <tuple>

#include "python/gil.h"
#include "python/round.h"
#include "python/rows.h"
#include "python/tensor_checks.h"
#include "python/threads.h"
#include "python/transforms.h"

namespace specengine {
namespace {

constexpr const char* kRegisterNames[] = {"hidden", "query", "attended", "residual", "expanded"};

Register register_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kRegisterNames); ++i) {
    if (name == kRegisterNames[i]) return static_cast<Register>(i);
  }
  fail("register: '", name, "' is unknown");
}

// Bounds of the two sums are for backends that cannot look at the lengths: here they are known.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expand_batch_op(
    const Tensor& tokens, const Tensor& block_table, const Tensor& slots, const Tensor& start,
    const Tensor& q_len, const Tensor& num_logits, int64_t block_size, std::optional<int64_t>,
    std::optional<int64_t>) {
  const auto history = matrix<const int32_t>(tokens, "tokens", -1, -1);
  const auto table = matrix<const int32_t>(block_table, "block_table", history.num_rows, -1);
  const IntInput rows(slots, "slots", -1);
  const int64_t count = rows.size();
  const IntInput firsts(start, "start", count), lengths(q_len, "q_len", count);
  const IntInput wanted(num_logits, "num_logits", count);
  const BatchRequest request{history, table, rows, firsts, lengths, wanted, block_size};
  const BatchSize size = measure_batch(request);
  const Tensor token_ids = empty_small({size.num_tokens});
  const Tensor positions = empty_small({size.num_tokens});
  const Tensor kv_slots = empty_small({size.num_tokens}, at::kLong);
  const Tensor q_start = empty_small({count + 1});
  const Tensor context_len = empty_small({count});
  const Tensor logit_rows = empty_small({size.num_logit_rows}, at::kLong);
  expand_batch(request, {token_ids.data_ptr<int32_t>(), positions.data_ptr<int32_t>(),
                         kv_slots.data_ptr<int64_t>(), q_start.data_ptr<int32_t>(),
                         context_len.data_ptr<int32_t>(), logit_rows.data_ptr<int64_t>()});
  return {token_ids, positions, kv_slots, q_start, context_len, logit_rows};
}

std::tuple<RowTensors, Tensor> row_keys_op(const RowTensors& rows, const Tensor& q_start,
                                           const Tensor& positions, const Tensor& logit_rows) {
  const IntInput starts(q_start, "q_start", -1), places(positions, "positions", -1);
  if (starts.size() < 1) fail("q_start: expected a number more than there are sequences, got none");
  const int64_t count = starts.size() - 1;
  const RowInputs by_sequence(rows, count);
  const Tensor chosen = small_input(logit_rows, "logit_rows", at::kLong, {-1});
  const int64_t num_rows = chosen.size(0);
  const RaggedRows ragged{count, nullptr, starts.data(), places.data(), chosen.data_ptr<int64_t>()};
  check_range(ragged.logit_rows, num_rows, "logit_rows", 0,
              std::min<int64_t>(places.size(), ragged.q_start[count]));
  const Tensor owners = empty_small({num_rows}), decided = empty_small({num_rows});
  ragged.decide(num_rows, owners.data_ptr<int32_t>(), decided.data_ptr<int32_t>());
  const RowOutputs out(num_rows);
  out.rows.take(*by_sequence, owners.data_ptr<int32_t>(), num_rows);
  return {out.tensors, decided};
}

class PyDecoder {
 public:
  PyDecoder(std::shared_ptr<Threads> threads, const Tensor& token_table,
            const std::optional<Tensor>& position_table, const std::optional<Tensor>& rotary,
            int64_t num_heads, int64_t num_kv_heads, int64_t head_dim)
      : threads_(std::move(threads)) {
    Program& program = program_;
    program.table_dtype = dtype_of(token_table, "token_table");
    dense_input(token_table, "token_table", token_table.scalar_type(), {-1, -1});
    program.hidden_size = token_table.size(1);
    program.token_table = keep(token_table).data_ptr();
    program.num_tokens = token_table.size(0);
    if (position_table) {
      dense_input(*position_table, "position_table", token_table.scalar_type(),
                  {-1, program.hidden_size});
      program.position_table = keep(*position_table).data_ptr();
      program.num_positions = position_table->size(0);
    }
    if (head_dim < 1 || head_dim > kMaxHeadDim || num_kv_heads < 1 || num_heads < 1 ||
        num_heads % num_kv_heads != 0) {
      fail("num_heads: ", num_heads, " heads on ", num_kv_heads, " of ", head_dim, " features");
    }
    if (rotary) {
      dense_input(*rotary, "rotary", at::kFloat, {-1, 2, -1});
      if (2 * rotary->size(2) > head_dim)
        fail("rotary: ", rotary->sizes(), " rotates more than ", head_dim, " features");
      program.rotary = keep(*rotary).data_ptr<float>();
      program.rotary_half = rotary->size(2);
      program.num_positions = std::min(program.num_positions, rotary->size(0));
    }
    program.num_heads = num_heads;
    program.num_kv_heads = num_kv_heads;
    program.head_dim = head_dim;
    widths_[static_cast<int>(Register::kHidden)] = program.hidden_size;
    widths_[static_cast<int>(Register::kQuery)] = num_heads * head_dim;
    widths_[static_cast<int>(Register::kAttended)] = num_heads * head_dim;
  }

  void norm_qkv(int64_t layer, const Tensor& norm_scale, const std::optional<Tensor>& norm_bias,
                double eps, const Tensor& panels, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& bias, int64_t in_features, int64_t out_features,
                const std::optional<Tensor>& head_norm) {
    check_width("weight", in_features, program_.hidden_size);
    check_width("weight", out_features,
                (program_.num_heads + 2 * program_.num_kv_heads) * program_.head_dim);
    const float* of_heads = head_norm_weight(head_norm, program_.head_dim);
    if (head_norm) keep(*head_norm);
    add(NormQkvStep{check_layer(layer), norm(norm_scale, norm_bias, eps, in_features),
                    linear(panels, scale, bias, in_features, out_features), of_heads});
  }

  void paged_attention(int64_t layer) { add(AttentionStep{check_layer(layer)}); }

  void linear_residual(const std::string& source, const Tensor& panels,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                       int64_t in_features, int64_t out_features, const std::string& residual,
                       const std::string& out) {
    check_width(source.c_str(), in_features, width_of(source));
    check_width(residual.c_str(), out_features, width_of(residual));
    set_width(out, out_features);
    add(LinearResidualStep{register_of(source),
                           linear(panels, scale, bias, in_features, out_features),
                           register_of(residual), register_of(out)});
  }

  void norm_linear(const std::string& source, const Tensor& norm_scale,
                   const std::optional<Tensor>& norm_bias, double eps, const Tensor& panels,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                   int64_t in_features, int64_t out_features, const std::string& activation,
                   const std::string& out) {
    check_width(source.c_str(), in_features, width_of(source));
    const Activation kind = activation_of(activation);
    set_width(out, check_activated(out_features, kind));
    add(NormLinearStep{register_of(source), norm(norm_scale, norm_bias, eps, in_features),
                       linear(panels, scale, bias, in_features, out_features), kind,
                       register_of(out)});
  }

  // The last op: from here on the program can run and cannot change.
  void head(const Tensor& norm_scale, const std::optional<Tensor>& norm_bias, double eps,
            const Tensor& panels, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& bias, int64_t in_features, int64_t out_features,
            const std::optional<Tensor>& token_ids) {
    check_width("weight", in_features, program_.hidden_size);
    program_.head = {norm(norm_scale, norm_bias, eps, in_features),
                     linear(panels, scale, bias, in_features, out_features),
                     head_token_ids(token_ids, out_features)};
    if (token_ids) keep(*token_ids);
    runner_.emplace(program_);
  }

  Tensor forward(const Tensor& token_ids, const Tensor& positions, const Tensor& kv_slots,
                 const Tensor& q_start, const Tensor& context_len, const Tensor& slots,
                 const Tensor& block_table, const Tensor& logit_rows, const Tensor& kv_cache,
                 int64_t vocab_size) {
    const Inputs inputs(*this, token_ids, positions, kv_slots, q_start, context_len, slots,
                        block_table, logit_rows, kv_cache);
    check_vocab_size(vocab_size, program_.head, program_.num_tokens);
    const int64_t padded = padded_vocab_size(vocab_size);
    Tensor logits = at::empty({inputs.view.num_logit_rows, padded}, at::kFloat);
    const ReleaseGil released;
    const ThreadsInUse in_use(*threads_);
    runner_->forward(inputs.view, vocab_size, logits.data_ptr<float>(), padded);
    return logits;
  }

  std::tuple<Tensor, Tensor> draw(const Tensor& token_ids, const Tensor& positions,
                                  const Tensor& kv_slots, const Tensor& q_start,
                                  const Tensor& context_len, const Tensor& slots,
                                  const Tensor& block_table, const Tensor& logit_rows,
                                  const Tensor& kv_cache, int64_t vocab_size,
                                  const RowTensors& rows,
                                  const std::optional<TransformTensors>& transforms) {
    const Inputs inputs(*this, token_ids, positions, kv_slots, q_start, context_len, slots,
                        block_table, logit_rows, kv_cache);
    check_vocab_size(vocab_size, program_.head, program_.num_tokens);
    const int64_t num_rows = inputs.view.num_logit_rows;
    const RowInputs judged_by(rows, inputs.view.num_sequences);
    Tensor tokens = empty_small({num_rows}), error = empty_small({num_rows});
    const auto tables = transform_tables(transforms);
    const ReleaseGil released;
    const ThreadsInUse in_use(*threads_);
    runner_->draw(inputs.view, vocab_size, *judged_by, tables ? &*tables : nullptr,
                  tokens.data_ptr<int32_t>(), error.data_ptr<int32_t>());
    return {tokens, error};
  }

  // Returns the tokens that were drawn, which are also written to `tokens`, and their error flags:
  // [B, max limits].
  std::tuple<Tensor, Tensor> draft(const Tensor& tokens, const Tensor& block_table,
                                   const Tensor& slots, const Tensor& start, const Tensor& seq_len,
                                   const Tensor& limits, const Tensor& kv_cache, int64_t vocab_size,
                                   const RowTensors& judged_by,
                                   const std::optional<TransformTensors>& transforms) {
    check_kv_cache(kv_cache);
    check_vocab_size(vocab_size, program_.head, program_.num_tokens);
    const auto history = matrix<int32_t>(tokens, "tokens", -1, -1);
    const auto table = matrix<const int32_t>(block_table, "block_table", history.num_rows, -1);
    const IntInput rows(slots, "slots", -1);
    const int64_t count = rows.size();
    const IntInput firsts(start, "start", count), lengths(seq_len, "seq_len", count);
    const IntInput limit(limits, "limits", count);
    const RowInputs by_sequence(judged_by, count);
    const auto tables = transform_tables(transforms);
    int32_t k = 0;
    for (const int32_t each : Ints(limit)) k = std::max(k, each);
    const Tensor drafted = at::zeros({count, k}, at::kInt), error = at::zeros({count, k}, at::kInt);
    const DraftCall call{history,
                         table,
                         rows,
                         firsts,
                         lengths,
                         limit,
                         kv_cache.data_ptr(),
                         dtype_of(kv_cache, "kv_cache"),
                         kv_cache.size(2),
                         kv_cache.size(4),
                         drafted.data_ptr<int32_t>(),
                         error.data_ptr<int32_t>(),
                         k};
    const ReleaseGil released;
    const ThreadsInUse in_use(*threads_);
    runner_->draft(call, vocab_size, *by_sequence, tables ? &*tables : nullptr);
    return {drafted, error};
  }

  // See PyRound. caches: this model's keys and values, then the draft's; vocab_sizes likewise.
  std::unique_ptr<PyRound> round(PyDecoder* draft, int64_t num_fed, std::vector<Tensor> caches,
                                 const std::vector<int64_t>& vocab_sizes, StateTensors state,
                                 const Tensor& slots, const RowTensors& rows,
                                 std::optional<TransformTensors> transforms,
                                 std::optional<GivenTensors> given, int64_t k,
                                 int64_t draft_positions, std::optional<float> forced_acceptance) {
    const size_t num_models = draft == nullptr ? 1 : 2;
    if (caches.size() != num_models || vocab_sizes.size() != num_models)
      fail("caches: ", caches.size(), " and ", vocab_sizes.size(), " vocabularies for ", num_models,
           " models");
    std::optional<RoundModel> drafting;
    if (draft != nullptr) drafting = draft->round_model(caches[1], vocab_sizes[1]);
    const RoundModel target = round_model(caches[0], vocab_sizes[0]);
    return std::make_unique<PyRound>(threads_, target, drafting, num_fed, std::move(caches),
                                     std::move(state), slots, rows, std::move(transforms),
                                     std::move(given), k, draft_positions, forced_acceptance);
  }

 private:
  RoundModel round_model(const Tensor& kv_cache, int64_t vocab_size) {
    check_kv_cache(kv_cache);
    check_vocab_size(vocab_size, program_.head, program_.num_tokens);
    return {&*runner_,        kv_cache.data_ptr(), dtype_of(kv_cache, "kv_cache"),
            kv_cache.size(2), kv_cache.size(4),    vocab_size};
  }

  // A checked batch; holds contiguous copies of small inputs alive.
  struct Inputs {
    BatchView view;
    Tensor token_ids, positions, kv_slots, q_start, context_len, slots, logit_rows;

    Inputs(const PyDecoder& decoder, const Tensor& ids, const Tensor& places,
           const Tensor& write_slots, const Tensor& starts, const Tensor& lengths,
           const Tensor& table_rows, const Tensor& block_table, const Tensor& wanted,
           const Tensor& kv_cache)
        : token_ids(small_input(ids, "token_ids", at::kInt, {-1})),
          positions(small_input(places, "positions", at::kInt, {token_ids.size(0)})),
          kv_slots(small_input(write_slots, "kv_slots", at::kLong, {token_ids.size(0)})),
          q_start(small_input(starts, "q_start", at::kInt, {table_rows.numel() + 1})),
          context_len(small_input(lengths, "context_len", at::kInt, {table_rows.numel()})),
          slots(small_input(table_rows, "slots", at::kInt, {-1})),
          logit_rows(small_input(wanted, "logit_rows", at::kLong, {-1})) {
      decoder.check_kv_cache(kv_cache);
      view.block_table = matrix<const int32_t>(block_table, "block_table", -1, -1);
      view.kv_dtype = dtype_of(kv_cache, "kv_cache");
      view.num_tokens = token_ids.size(0);
      view.num_sequences = slots.size(0);
      view.token_ids = token_ids.data_ptr<int32_t>();
      view.positions = positions.data_ptr<int32_t>();
      view.kv_slots = kv_slots.data_ptr<int64_t>();
      view.q_start = q_start.data_ptr<int32_t>();
      view.context_len = context_len.data_ptr<int32_t>();
      view.slots = slots.data_ptr<int32_t>();
      view.logit_rows = logit_rows.data_ptr<int64_t>();
      view.num_logit_rows = logit_rows.size(0);
      view.kv_cache = kv_cache.data_ptr();
      view.num_blocks = kv_cache.size(2);
      view.block_size = kv_cache.size(4);
    }
  };

  void check_kv_cache(const Tensor& kv_cache) const {
    if (!runner_) fail("head: the program has no head yet");
    dense_input(kv_cache, "kv_cache", kv_cache.scalar_type(),
                {-1, 2, -1, program_.num_kv_heads, -1, program_.head_dim});
    if (kv_cache.size(0) < num_layers_ || kv_cache.size(4) < 1)
      fail("kv_cache: ", shape_of(kv_cache), " does not hold ", num_layers_, " layers");
  }

  const Tensor& keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return kept_.back();
  }

  LinearWeight linear(const Tensor& panels, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, int64_t in_features,
                      int64_t out_features) {
    const LinearWeight weight = linear_weight(panels, scale, bias, in_features, out_features);
    keep(panels);
    if (scale) keep(*scale);
    if (bias) keep(*bias);
    return weight;
  }

  NormWeight norm(const Tensor& scale, const std::optional<Tensor>& bias, double eps,
                  int64_t features) {
    const NormWeight weight = norm_weight(scale, bias, eps, features);
    keep(scale);
    if (bias) keep(*bias);
    return weight;
  }

  void add(Step step) {
    if (runner_) fail("head: the program has its head already");
    program_.steps.push_back(std::move(step));
  }

  int64_t check_layer(int64_t layer) {
    if (layer < 0) fail("layer: ", layer, " is negative");
    num_layers_ = std::max(num_layers_, layer + 1);
    return layer;
  }

  static void check_width(const char* name, int64_t given, int64_t expected) {
    if (given != expected) fail(name, ": ", given, " features where ", expected, " are expected");
  }

  int64_t width_of(const std::string& name) const {
    return widths_[static_cast<int>(register_of(name))];
  }

  void set_width(const std::string& name, int64_t width) {
    int64_t& known = widths_[static_cast<int>(register_of(name))];
    if (known != 0 && known != width) check_width(name.c_str(), width, known);
    known = width;
  }

  std::shared_ptr<Threads> threads_;
  Program program_{};
  std::optional<DecoderRunner> runner_;
  std::vector<Tensor> kept_;
  int64_t widths_[static_cast<int>(Register::kNumRegisters)] = {};
  int64_t num_layers_ = 0;
};

}  // namespace
}  // namespace specengine

void bind_decoder(pybind11::module_& m) {
  using at::Tensor;
  using pybind11::arg;
  using specengine::PyDecoder;
  m.def("expand_batch", &specengine::expand_batch_op, arg("tokens"), arg("block_table"),
        arg("slots"), arg("start"), arg("q_len"), arg("num_logits"), arg("block_size"),
        pybind11::kw_only(), arg("num_tokens") = pybind11::none(),
        arg("num_logit_rows") = pybind11::none());
  m.def("row_keys", &specengine::row_keys_op);
  pybind11::class_<specengine::PyRound>(m, "Round")
      .def("run", &specengine::PyRound::run)
      .def("drafts", &specengine::PyRound::drafts);
  pybind11::class_<PyDecoder>(m, "Decoder")
      .def(pybind11::init<std::shared_ptr<specengine::Threads>, const at::Tensor&,
                          const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                          int64_t, int64_t, int64_t>())
      .def("norm_qkv", &PyDecoder::norm_qkv)
      .def("paged_attention", &PyDecoder::paged_attention)
      .def("linear_residual", &PyDecoder::linear_residual)
      .def("norm_linear", &PyDecoder::norm_linear)
      .def("head", &PyDecoder::head)
      .def("forward", &PyDecoder::forward)
      .def("draw", &PyDecoder::draw)
      .def("draft", &PyDecoder::draft)
      .def("round", &PyDecoder::round, pybind11::keep_alive<0, 1>(), pybind11::keep_alive<0, 2>());
}
