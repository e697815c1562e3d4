/* The entry points: check the caller's layout, pick the instruction set, run. */
#include "../fastmp.h"

namespace fastmp {

static fastmp_parallel_for pool = nullptr;

void run_parallel(int64_t n, int64_t grain, fastmp_range_fn fn, void* ctx) {
  if (n <= 0) return;
  if (pool == nullptr || n <= grain) {
    fn(0, n, ctx);
  } else {
    pool(0, n, grain, fn, ctx);
  }
}

enum class Target { base, v3, v4 };

static Target detect() {
#if defined(FASTMP_X86_TARGETS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Target::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Target::v3;
#endif
  return Target::base;
}

static const Target target = detect();

}  // namespace fastmp

#if defined(FASTMP_X86_TARGETS)
#define FASTMP_ENTRY(name, Args)                                             \
  namespace fastmp {                                                         \
  namespace base {                                                           \
  int name(Args* args);                                                      \
  }                                                                          \
  namespace v3 {                                                             \
  int name(Args* args);                                                      \
  }                                                                          \
  namespace v4 {                                                             \
  int name(Args* args);                                                      \
  }                                                                          \
  }                                                                          \
  extern "C" int32_t fastmp_##name(Args* args) {                             \
    using namespace fastmp;                                                  \
    if (args == nullptr || args->size != static_cast<int64_t>(sizeof(Args))) \
      return FASTMP_BAD_ARGUMENT;                                            \
    if (target == Target::v4) return v4::name(args);                         \
    if (target == Target::v3) return v3::name(args);                         \
    return base::name(args);                                                 \
  }
#else
#define FASTMP_ENTRY(name, Args)                                             \
  namespace fastmp {                                                         \
  namespace base {                                                           \
  int name(Args* args);                                                      \
  }                                                                          \
  }                                                                          \
  extern "C" int32_t fastmp_##name(Args* args) {                             \
    if (args == nullptr || args->size != static_cast<int64_t>(sizeof(Args))) \
      return FASTMP_BAD_ARGUMENT;                                            \
    return fastmp::base::name(args);                                         \
  }
#endif

FASTMP_ENTRY(update, const fastmp_update_args)
FASTMP_ENTRY(loss_forward, fastmp_loss_args)
FASTMP_ENTRY(loss_backward, fastmp_loss_args)
FASTMP_ENTRY(mix, const fastmp_mix_args)

extern "C" int32_t fastmp_abi_version(void) {
  return FASTMP_ABI_VERSION;
}

extern "C" const char* fastmp_target(void) {
  switch (fastmp::target) {
    case fastmp::Target::v4:
      return "v4";
    case fastmp::Target::v3:
      return "v3";
    default:
      return "base";
  }
}

extern "C" void fastmp_set_parallel_for(fastmp_parallel_for new_pool) {
  fastmp::pool = new_pool;
}
