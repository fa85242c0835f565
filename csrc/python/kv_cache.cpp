// Python bindings of the paged KV cache manager: argument conversion and exceptions, nothing else.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include "core/paged_kv_cache.h"

namespace py = pybind11;

namespace {

using specengine::BlockCopy;
using specengine::InvalidArgumentError;
using specengine::PagedKVCache;

// Any Python integer. One beyond 64 bits becomes the nearest int64, which the manager's own check
// of that argument then refuses by name.
struct Integer {
  int64_t value = 0;
  operator int64_t() const { return value; }
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Integer> {
  PYBIND11_TYPE_CASTER(Integer, const_name("int"));

  bool load(handle source, bool /*convert*/) {
    const auto index = reinterpret_steal<object>(PyNumber_Index(source.ptr()));
    if (!index) {
      PyErr_Clear();
      return false;
    }
    int overflow = 0;
    value.value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow < 0) value.value = std::numeric_limits<int64_t>::min();
    if (overflow > 0) value.value = std::numeric_limits<int64_t>::max();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

// A borrowed int32 array (free of charge), or a converted copy of any other sequence of integers.
class TokenIds {
 public:
  explicit TokenIds(const py::object& token_ids) {
    if (py::isinstance<Int32Array>(token_ids)) {
      borrow(py::reinterpret_borrow<Int32Array>(token_ids));
    } else {
      convert(token_ids);
    }
  }

  operator specengine::TokenSpan() const { return span_; }

 private:
  using Int32Array = py::array_t<int32_t, py::array::c_style>;

  void borrow(const Int32Array& token_ids) {
    if (token_ids.ndim() != 1) {
      throw InvalidArgumentError("token_ids has " + std::to_string(token_ids.ndim()) +
                                 " dimensions, not 1");
    }
    span_ = {token_ids.data(), token_ids.size()};
  }

  void convert(const py::object& token_ids) {
    std::vector<Integer> values;
    try {
      values = token_ids.cast<std::vector<Integer>>();
    } catch (const py::cast_error&) {
      const auto type_name = py::type::of(token_ids).attr("__name__").cast<std::string>();
      throw InvalidArgumentError("token_ids (" + type_name + ") is no flat sequence of integers");
    }
    converted_.reserve(values.size());
    for (const int64_t value : values) {
      if (value != static_cast<int32_t>(value)) {
        throw InvalidArgumentError("token_ids[" + std::to_string(converted_.size()) +
                                   "]=" + std::to_string(value) + " does not fit in 32 bits");
      }
      converted_.push_back(static_cast<int32_t>(value));
    }
    span_ = {converted_.data(), static_cast<int64_t>(converted_.size())};
  }

  std::vector<int32_t> converted_;
  specengine::TokenSpan span_{nullptr, 0};
};

// Raises specengine.errors.<name>. Imported when needed: errors.py has no reason to wait for _C.
void raise_specengine_error(const char* name, const std::exception& error) {
  const py::object type = py::module_::import("specengine.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate_errors(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const InvalidArgumentError& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const specengine::OutOfBlocksError& e) {
    raise_specengine_error("OutOfBlocksError", e);
  } catch (const specengine::OutOfSlotsError& e) {
    raise_specengine_error("OutOfSlotsError", e);
  } catch (const specengine::UnknownSequenceError& e) {
    raise_specengine_error("UnknownSequenceError", e);
  } catch (const specengine::KVCacheError& e) {
    raise_specengine_error("KVCacheError", e);
  } catch (const specengine::InvariantError& e) {
    PyErr_SetString(PyExc_AssertionError, e.what());
  }
}

PagedKVCache* build_cache(Integer num_blocks, Integer block_size, Integer max_sequences,
                          Integer max_blocks_per_sequence, Integer num_models,
                          Integer block_table_address, bool enable_prefix_cache) {
  specengine::PagedKVCacheOptions options;
  options.num_blocks = num_blocks;
  options.block_size = block_size;
  options.max_sequences = max_sequences;
  options.max_blocks_per_sequence = max_blocks_per_sequence;
  options.num_models = num_models;
  options.block_table = reinterpret_cast<int32_t*>(block_table_address.value);
  options.enable_prefix_cache = enable_prefix_cache;
  return new PagedKVCache(options);
}

py::list to_pairs(const std::vector<BlockCopy>& copies) {
  py::list pairs;
  for (const auto& [source, destination] : copies) {
    pairs.append(py::make_tuple(source, destination));
  }
  return pairs;
}

}  // namespace

void bind_paged_kv_cache(py::module_& module) {
  py::register_local_exception_translator(translate_errors);

  py::class_<PagedKVCache>(module, "PagedKVCache", R"(
Which block of KV memory holds which positions of which sequence, and how far each model computed
them. csrc/paged_kv_cache.h documents every method.

block_table_address is the data_ptr() of an int32 [max_sequences, max_blocks_per_sequence] array
that the caller keeps alive and never writes; row `slot` lists that sequence's blocks, then zeros.

Raises ValueError (argument and value), OutOfBlocksError, OutOfSlotsError, UnknownSequenceError;
after any of them the state is what it was.)")
      .def(py::init(&build_cache), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_sequences"), py::arg("max_blocks_per_sequence"), py::arg("num_models"),
           py::arg("block_table_address"), py::arg("enable_prefix_cache") = true)

      .def(
          "allocate",
          [](PagedKVCache& cache, const py::object& token_ids, Integer max_cached_tokens) {
            return cache.allocate(TokenIds(token_ids), max_cached_tokens);
          },
          py::arg("token_ids"), py::arg("max_cached_tokens"),
          "Start a sequence on the indexed blocks that spell its beginning; return its slot.")
      .def(
          "extend",
          [](PagedKVCache& cache, Integer slot, Integer first_position, Integer num_tokens) {
            return to_pairs(cache.extend(slot, first_position, num_tokens));
          },
          py::arg("slot"), py::arg("first_position"), py::arg("num_tokens"),
          "Make [first_position, num_tokens) writable; return the (source, destination) blocks to "
          "copy first.")
      .def(
          "num_blocks_needed",
          [](const PagedKVCache& cache, Integer slot, Integer first_position, Integer num_tokens) {
            return cache.num_blocks_needed(slot, first_position, num_tokens);
          },
          py::arg("slot"), py::arg("first_position"), py::arg("num_tokens"),
          "Blocks that extend would take.")
      .def(
          "can_extend",
          [](const PagedKVCache& cache, Integer slot, Integer first_position, Integer num_tokens) {
            return cache.can_extend(slot, first_position, num_tokens);
          },
          py::arg("slot"), py::arg("first_position"), py::arg("num_tokens"),
          "Whether extend would find enough blocks.")
      .def(
          "num_computed_tokens",
          [](const PagedKVCache& cache, Integer slot, Integer model) {
            return cache.num_computed_tokens(slot, model);
          },
          py::arg("slot"), py::arg("model"),
          "The watermark: leading positions whose KV the model has computed.")
      .def(
          "set_computed",
          [](PagedKVCache& cache, Integer slot, Integer model, Integer num_tokens) {
            cache.set_computed(slot, model, num_tokens);
          },
          py::arg("slot"), py::arg("model"), py::arg("num_tokens"), "Set a model's watermark.")
      .def(
          "rollback",
          [](PagedKVCache& cache, Integer slot, Integer num_tokens) {
            cache.rollback(slot, num_tokens);
          },
          py::arg("slot"), py::arg("num_tokens"), "Lower every watermark to at most num_tokens.")
      .def(
          "fork",
          [](PagedKVCache& cache, Integer slot, Integer num_tokens) {
            return cache.fork(slot, num_tokens);
          },
          py::arg("slot"), py::arg("num_tokens"),
          "A new sequence sharing the blocks of the first num_tokens positions; return its slot.")
      .def(
          "publish",
          [](PagedKVCache& cache, Integer slot, const py::object& token_ids) {
            cache.publish(slot, TokenIds(token_ids));
          },
          py::arg("slot"), py::arg("token_ids"),
          "Index the full computed blocks of the committed tokens.")
      .def(
          "trim",
          [](PagedKVCache& cache, Integer slot, Integer num_tokens) {
            cache.trim(slot, num_tokens);
          },
          py::arg("slot"), py::arg("num_tokens"),
          "Give back the blocks beyond those of the first num_tokens positions.")
      .def(
          "free", [](PagedKVCache& cache, Integer slot) { cache.free(slot); }, py::arg("slot"),
          "End the sequence.")
      .def("reset_prefix_cache", &PagedKVCache::reset_prefix_cache, "Empty the prefix index.")

      .def_property_readonly("num_blocks", &PagedKVCache::num_blocks)
      .def_property_readonly("block_size", &PagedKVCache::block_size)
      .def_property_readonly("num_free_blocks", &PagedKVCache::num_free_blocks,
                             "Free and evictable blocks.")
      .def_property_readonly("num_cached_blocks", &PagedKVCache::num_cached_blocks,
                             "Indexed blocks, in use or not.")
      .def_property_readonly("num_hashed_blocks", &PagedKVCache::num_hashed_blocks,
                             "Times that a block's tokens were hashed so far.")
      .def_property_readonly("num_sequences", &PagedKVCache::num_sequences)
      .def(
          "capacity", [](const PagedKVCache& cache, Integer slot) { return cache.capacity(slot); },
          py::arg("slot"), "Addressable positions.")
      .def(
          "reference_count",
          [](const PagedKVCache& cache, Integer block) { return cache.reference_count(block); },
          py::arg("block"))
      .def(
          "sequence_blocks",
          [](const PagedKVCache& cache, Integer slot) { return cache.sequence_blocks(slot); },
          py::arg("slot"))
      .def("check_invariants", &PagedKVCache::check_invariants,
           "Recount everything; AssertionError with numbers at the first contradiction.");
}
