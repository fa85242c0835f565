#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specengine {
namespace {

// Whether the processor has tiles of bf16 and int8, and the system lets this process use them: it
// wants to be asked, since a thread that does has 8 KB more to be saved. Children that fork() makes
// may too.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kFeatures = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr unsigned kStates = 3u << 17;  // the system saves configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, features, states, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
  if ((features & kFeatures) != kFeatures) return false;
  asm volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
  return (states & kStates) == kStates &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(name, "avx512_amx") == 0 && has_bf16) {
    static const bool has_tiles = may_use_tiles();
    return has_tiles ? &kAvx512AmxKernels : nullptr;
  }
  if (std::strcmp(name, "avx512_bf16") == 0 && has_bf16) return &kAvx512Bf16Kernels;
  if (std::strcmp(name, "avx512_vnni") == 0 && has_vnni) return &kAvx512VnniKernels;
  if (std::strcmp(name, "avx512") == 0 && has_avx512) return &kAvx512Kernels;
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kAvx2Kernels;
  }
#endif
  if (std::strcmp(name, "emulated_tiles") == 0) return &kEmulatedTilesKernels;
  return std::strcmp(name, "portable") == 0 ? &kPortableKernels : nullptr;
}

// Whether products of bf16 vectors are faster than those of fp32, as AMD's are. On an Intel server
// with AMX a prompt of 256 tokens took 1.4 times as long with them, and nothing was faster.
bool multiplies_bf16_fast() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Kernels* find_best() {
  if (const char* wanted = std::getenv("SPECENGINE_INSTRUCTION_SET")) {
    if (const Kernels* found = find(wanted)) return found;
  }
  for (const char* name : {"avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"}) {
    if (std::strcmp(name, "avx512_bf16") == 0 && !multiplies_bf16_fast()) continue;
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
