// Python bindings of the suffix automaton: argument conversion, nothing else.

#include "core/suffix_automaton.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace {

using specengine::SuffixAutomaton;
using Tokens = std::vector<int32_t>;

std::tuple<int64_t, Tokens> as_tuple(SuffixAutomaton::Draft draft) {
  return {draft.match_length, std::move(draft.tokens)};
}

}  // namespace

void bind_suffix_automaton(py::module_& m) {
  py::class_<SuffixAutomaton>(m, "SuffixAutomaton")
      .def(py::init<int64_t>(), py::arg("max_tokens"))
      .def_readonly_static("MAX_BYTES_PER_TOKEN", &SuffixAutomaton::kMaxBytesPerToken)
      .def(
          "append", [](SuffixAutomaton& self, const Tokens& tokens) { self.append(tokens); },
          py::arg("tokens"), "Lengthen the text.")
      .def(
          "draft",
          [](const SuffixAutomaton& self, int64_t limit, const Tokens& drafted) {
            return as_tuple(self.draft(limit, drafted));
          },
          py::arg("limit"), py::arg("drafted") = Tokens{},
          "Length of the match with the end of the text, and of what is drafted behind it, and "
          "what followed.")
      .def(
          "draft_after",
          [](const SuffixAutomaton& self, const Tokens& context, int64_t limit) {
            return as_tuple(self.draft_after(context, limit));
          },
          py::arg("context"), py::arg("limit"), "The same for the end of another text.")
      .def_property_readonly("num_seen", &SuffixAutomaton::num_seen)
      .def_property_readonly("num_tokens", &SuffixAutomaton::num_tokens)
      .def_property_readonly("num_bytes", &SuffixAutomaton::num_bytes);
}
