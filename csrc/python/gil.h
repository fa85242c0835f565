// The interpreter's lock, given up while the core works.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>
#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace specengine {

// Python ends a daemon thread that asks for the lock while the interpreter ends, by unwinding its
// stack through whoever asks: out of a destructor, as pybind11's own guard does, that terminates
// the process. Such a thread stands still here until the process is gone.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

  ~ReleaseGil() {
#if defined(__GLIBCXX__)
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }

 private:
  PyThreadState* state_;
};

}  // namespace specengine
