// What the bindings ask of a tensor before they hand its pointer on. Every failure is a ValueError
// that names the argument.
#pragma once

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#endif
#include <torch/extension.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include <ATen/EmptyTensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <type_traits>

#include "core/ops.h"
#include "core/views.h"

namespace specengine {

namespace py = pybind11;
using at::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

// -1 stands for any size.
inline void check_shape(const Tensor& tensor, const char* name, at::ScalarType dtype,
                        at::IntArrayRef shape) {
  bool is_right = tensor.defined() && tensor.device().is_cpu() && tensor.scalar_type() == dtype &&
                  tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; is_right && i < shape.size(); ++i)
    is_right = shape[i] < 0 || tensor.size(i) == shape[i];
  if (is_right) return;
  std::ostringstream expected;
  expected << dtype << " [";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) expected << ", ";
    if (shape[i] < 0) {
      expected << "any";
    } else {
      expected << shape[i];
    }
  }
  fail(name, ": expected a CPU tensor ", expected.str(), "], got ",
       tensor.defined() ? shape_of(tensor) + " on " + tensor.device().str() : "nothing");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  if (!tensor.is_contiguous())
    fail(name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

// Without a trip through PyTorch's dispatcher, which costs as much as a small op itself.
inline Tensor empty_small(at::IntArrayRef shape, at::ScalarType dtype = at::kInt) {
  return Tensor(at::detail::empty_cpu(shape, dtype));
}

// A checked input, made contiguous (small tensors only).
inline Tensor small_input(const Tensor& tensor, const char* name, at::ScalarType dtype,
                          at::IntArrayRef shape) {
  check_shape(tensor, name, dtype, shape);
  return tensor.contiguous();
}

inline Tensor dense_input(const Tensor& tensor, const char* name, at::ScalarType dtype,
                          at::IntArrayRef shape) {
  check_shape(tensor, name, dtype, shape);
  check_contiguous(tensor, name);
  return tensor;
}

// A checked input of int32, kept alive.
class IntInput {
 public:
  IntInput(const Tensor& given, const char* name, int64_t count)
      : tensor_(small_input(given, name, at::kInt, {count})) {}
  const int32_t* data() const { return tensor_.data_ptr<int32_t>(); }
  int64_t size() const { return tensor_.size(0); }
  operator Ints() const { return {data(), static_cast<size_t>(size())}; }

 private:
  Tensor tensor_;
};

template <class T>
Matrix<T> matrix(const Tensor& tensor, const char* name, int64_t num_rows, int64_t width) {
  constexpr bool is_float = std::is_same_v<std::remove_const_t<T>, float>;
  static_assert(is_float || std::is_same_v<std::remove_const_t<T>, int32_t>);
  check_shape(tensor, name, is_float ? at::kFloat : at::kInt, {num_rows, width});
  if (tensor.size(1) > 1 && tensor.stride(1) != 1)
    fail(name, ": expected rows with stride 1, got strides ", tensor.strides());
  return {tensor.data_ptr<std::remove_const_t<T>>(), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

inline DType dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      fail(name, ": expected float32, bfloat16 or float16, got ", type);
  }
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  if (!tensor.device().is_cpu())
    fail(name, ": expected a CPU tensor, got one on ", tensor.device());
  return dtype_of(tensor.scalar_type(), name);
}

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "swiglu") return Activation::kSwiglu;
  fail("activation: '", name, "' is unknown; expected none, relu, gelu, gelu_tanh or swiglu");
}

inline LogitRows logit_rows(const Tensor& logits, const char* name) {
  check_shape(logits, name, at::kFloat, {-1, -1});
  if (logits.size(1) < 1 || logits.size(1) > INT32_MAX)
    fail(name, ": a row of ", logits.size(1), " logits");
  if (logits.size(1) > 1 && logits.stride(1) != 1) {
    fail(name, ": expected rows with stride 1, got strides ", logits.strides());
  }
  return {logits.data_ptr<float>(), logits.stride(0), logits.size(0), logits.size(1)};
}

// What panels hold: of weights by group their length tells which.
inline DType panels_dtype(const Tensor& panels, int64_t in_features, int64_t out_features) {
  if (panels.scalar_type() == at::kChar) return DType::kInt8;
  if (panels.scalar_type() != at::kByte) return dtype_of(panels, "weight");
  for (const DType dtype : {DType::kInt4, DType::kInt4Min}) {
    if (panels.numel() == packed_bytes(out_features, in_features, dtype)) return dtype;
  }
  return DType::kInt8Group;
}

// A weight from pack_linear or pack_grouped, or from pack_linear_int8 with its scale, with what the
// call needs kept alive by the caller.
inline LinearWeight linear_weight(const Tensor& panels, const std::optional<Tensor>& scale,
                                  const std::optional<Tensor>& bias, int64_t in_features,
                                  int64_t out_features) {
  const DType dtype = panels_dtype(panels, in_features, out_features);
  if (in_features < 1 || out_features < 1 || !panels.device().is_cpu() ||
      static_cast<int64_t>(panels.nbytes()) != packed_bytes(out_features, in_features, dtype) ||
      (is_grouped(dtype) && in_features % kGroupK != 0) || !panels.is_contiguous()) {
    fail("weight: ", shape_of(panels), " is not a packed ", out_features, " x ", in_features,
         " linear");
  }
  if (scale.has_value() != (dtype == DType::kInt8)) {
    fail("scale: int8 weights have one, others none; weight is ", panels.scalar_type());
  }
  const auto numbers = [out_features](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return static_cast<const float*>(nullptr);
    return static_cast<const float*>(
        dense_input(*tensor, name, at::kFloat, {out_features}).data_ptr<float>());
  };
  return {panels.data_ptr(),     dtype,       numbers(scale, "scale"),
          numbers(bias, "bias"), in_features, out_features};
}

// The features that a layer gives after its activation.
inline int64_t check_activated(int64_t out_features, Activation activation) {
  if (activation == Activation::kSwiglu && out_features % 2 != 0)
    fail("weight: ", out_features, " output features are no pairs, which swiglu wants");
  return activated_columns(out_features, activation);
}

inline NormWeight norm_weight(const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                              int64_t features) {
  dense_input(weight, "norm.weight", at::kFloat, {features});
  if (bias) dense_input(*bias, "norm.bias", at::kFloat, {features});
  return {weight.data_ptr<float>(), bias ? bias->data_ptr<float>() : nullptr,
          static_cast<float>(eps)};
}

// Weights of the RMSNorm of queries' and keys' heads, or null.
inline const float* head_norm_weight(const std::optional<Tensor>& weight, int64_t head_dim) {
  if (!weight) return nullptr;
  return dense_input(*weight, "head_norm", at::kFloat, {2, head_dim}).data_ptr<float>();
}

// most: the vocabulary of a head that has only some of its tokens.
inline void check_vocab_size(int64_t vocab_size, const Head& head, int64_t most = INT32_MAX) {
  if (head.has_all_tokens()) most = head.weight.out_features;
  if (vocab_size < 1 || vocab_size > most) {
    fail("vocab_size: ", vocab_size, " is outside 1 … ", most, ", the head's tokens");
  }
}

// The caller keeps the tensor alive.
inline Ints head_token_ids(const std::optional<Tensor>& tensor, int64_t out_features) {
  if (!tensor) return {};
  dense_input(*tensor, "token_ids", at::kInt, {out_features});
  const Ints ids(tensor->data_ptr<int32_t>(), static_cast<size_t>(out_features));
  for (size_t at = 0; at < ids.size(); ++at) {
    const int32_t before = at == 0 ? -1 : ids[at - 1];
    if (ids[at] <= before)
      fail("token_ids: expected them to ascend from 0 on, got ", ids[at], " after ", before);
  }
  return ids;
}

inline int64_t padded_vocab_size(int64_t vocab_size) { return (vocab_size + 127) / 128 * 128; }

}  // namespace specengine
