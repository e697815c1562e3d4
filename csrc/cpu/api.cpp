/* The entry points: check the caller's layout, pick the instruction set, run. */
#include "../fastmp.h"

/* The instruction sets that the kernels are compiled for; CMakeLists.txt names the flags. */
#if defined(FASTMP_X86_TARGETS)
#define FASTMP_TARGETS(X, ...) \
  X(base, __VA_ARGS__) X(v3, __VA_ARGS__) X(v4, __VA_ARGS__) X(v4bf16, __VA_ARGS__)
#else
#define FASTMP_TARGETS(X, ...) X(base, __VA_ARGS__)
#endif
#define FASTMP_IDENTIFIER(target, _) target,
#define FASTMP_STRING(target, _) #target,

namespace fastmp {
namespace {

fastmp_parallel_for pool = nullptr;

enum class Target { FASTMP_TARGETS(FASTMP_IDENTIFIER, ) };

Target detect() {
#if defined(FASTMP_X86_TARGETS)
  /* By features: GCC 11 and clang 14 do not know "x86-64-v3". Every CPU that has these four has
   * the rest of v3: F16C, LZCNT, MOVBE. */
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return __builtin_cpu_supports("avx512bf16") ? Target::v4bf16 : Target::v4;
  if (v3) return Target::v3;
#endif
  return Target::base;
}

const Target target = detect();

}  // namespace

void run_parallel(int64_t n, int64_t grain, fastmp_range_fn fn, void* ctx) {
  if (n <= 0) return;
  if (pool == nullptr || n <= grain) {
    fn(0, n, ctx);
  } else {
    pool(0, n, grain, fn, ctx);
  }
}

}  // namespace fastmp

#define FASTMP_DECLARE(target, name, Args) \
  namespace target {                       \
  int name(Args* args);                    \
  }
#define FASTMP_KERNEL(target, name) target::name,

#define FASTMP_ENTRY(name, Args)                                                     \
  namespace fastmp {                                                                 \
  FASTMP_TARGETS(FASTMP_DECLARE, name, Args)                                         \
  }                                                                                  \
  extern "C" int32_t fastmp_##name(Args* args) {                                     \
    using namespace fastmp;                                                          \
    int (*const kernels[])(Args*) = {FASTMP_TARGETS(FASTMP_KERNEL, name)};           \
    const bool readable = args != nullptr && args->size == int64_t{sizeof(Args)};    \
    return readable ? kernels[static_cast<int>(target)](args) : FASTMP_BAD_ARGUMENT; \
  }

FASTMP_ENTRY(update, const fastmp_update_args)
FASTMP_ENTRY(loss_forward, fastmp_loss_args)
FASTMP_ENTRY(loss_backward, fastmp_loss_args)
FASTMP_ENTRY(mix, const fastmp_mix_args)
FASTMP_ENTRY(gemm, const fastmp_gemm_args)
FASTMP_ENTRY(batched_gemm, const fastmp_batched_gemm_args)
FASTMP_ENTRY(activation, const fastmp_activation_args)
FASTMP_ENTRY(activation_backward, const fastmp_activation_args)

extern "C" int32_t fastmp_abi_version(void) {
  return FASTMP_ABI_VERSION;
}

extern "C" const char* fastmp_target(void) {
  const char* const names[] = {FASTMP_TARGETS(FASTMP_STRING, )};
  return names[static_cast<int>(fastmp::target)];
}

extern "C" void fastmp_set_parallel_for(fastmp_parallel_for new_pool) {
  fastmp::pool = new_pool;
}
