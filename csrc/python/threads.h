// Ops as methods of the threads that they may use.
#pragma once

#include <memory>
#include <utility>

#include "core/thread_pool.h"
#include "python/tensor_checks.h"

namespace specengine {

// specengine._C.Ops: an engine has one, and its decoders keep it alive.
using OpsClass = py::class_<Threads, std::shared_ptr<Threads>>;

template <class Result, class... Arguments>
auto on_threads(Result (*op)(Arguments...)) {
  return [op](Threads& threads, Arguments... arguments) -> Result {
    const ThreadsInUse in_use(threads);
    return op(std::forward<Arguments>(arguments)...);
  };
}

}  // namespace specengine
