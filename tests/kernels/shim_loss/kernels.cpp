/* Every kernel of csrc/cuda/loss.cu by the name that the launching code compiles. */
#include <string>

#include "shim.h"

namespace fastmp {
namespace {

struct Named {
  LossKernel kernel;
  int32_t cluster;
};

std::map<std::string, Named> make_table() {
  std::map<std::string, Named> table;
#define FASTMP_ADD(T, smooth, aligned)                                                         \
  table["fastmp::loss_rows<fastmp::Config<" #T ", fastmp::Smooth::" #smooth ", " #aligned      \
        ", 16, 1, 2>, 1>"] = {loss_kernel<T, Smooth::smooth, aligned, 1>(), 1};                \
  table["fastmp::loss_half_rows<fastmp::Config<" #T ", fastmp::Smooth::" #smooth ", " #aligned \
        ", 16, 2, 1>>"] = {loss_kernel<T, Smooth::smooth, aligned, 2>(), 2};
#define FASTMP_ADD_SMOOTH(T, aligned) \
  FASTMP_ADD(T, none, aligned)        \
  FASTMP_ADD(T, equal, aligned) FASTMP_ADD(T, weighted, aligned)
#define FASTMP_ADD_TYPE(T) FASTMP_ADD_SMOOTH(T, true) FASTMP_ADD_SMOOTH(T, false)
  FASTMP_ADD_TYPE(float)
  FASTMP_ADD_TYPE(fastmp::f16)
  FASTMP_ADD_TYPE(fastmp::bf16)
  table["fastmp::loss_divisors<2>"] = {loss_divisors<kDivisorParts>, 1};
  table["fastmp::loss_sum<20>"] = {loss_sum<kThreads>, 1};
  return table;
}

}  // namespace
}  // namespace fastmp

/* Whether there is a kernel of this name; runs it on so many blocks. */
extern "C" bool shim_loss(const char* name, int32_t blocks, const fastmp_ring_args* args,
                          int64_t ring_bytes) {
  static const auto table = fastmp::make_table();
  const auto found = table.find(name);
  if (found == table.end()) return false;
  fastmp::launch(found->second.kernel, blocks, found->second.cluster, args,
                 static_cast<size_t>(ring_bytes));
  return true;
}
