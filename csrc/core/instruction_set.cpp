#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/kernels.h"

namespace specengine {
namespace {

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx512_bf16") == 0 && has_avx512 && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bf16")) {
    return &kAvx512Bf16Kernels;
  }
  if (std::strcmp(name, "avx512") == 0 && has_avx512) return &kAvx512Kernels;
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kAvx2Kernels;
  }
#endif
  return std::strcmp(name, "portable") == 0 ? &kPortableKernels : nullptr;
}

const Kernels* find_best() {
  if (const char* wanted = std::getenv("SPECENGINE_INSTRUCTION_SET")) {
    if (const Kernels* found = find(wanted)) return found;
  }
  for (const char* name : {"avx512_bf16", "avx512", "avx2"}) {
    if (const Kernels* found = find(name)) return found;
  }
  return &kPortableKernels;
}

std::atomic<const Kernels*> g_kernels{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = g_kernels.load(std::memory_order_acquire);
  if (current == nullptr) {
    current = find_best();
    g_kernels.store(current, std::memory_order_release);
  }
  return *current;
}

bool set_instruction_set(const char* name) {
  const Kernels* found = std::strcmp(name, "auto") == 0 ? find_best() : find(name);
  if (found == nullptr) return false;
  g_kernels.store(found, std::memory_order_release);
  return true;
}

bool supports_instruction_set(const char* name) { return find(name) != nullptr; }

}  // namespace specengine
