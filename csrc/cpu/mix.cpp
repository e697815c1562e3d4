#include "cpu.h"

namespace fastmp {
namespace FASTMP_TARGET {
int mix(const fastmp_mix_args*) { return FASTMP_BAD_ARGUMENT; }
}  // namespace FASTMP_TARGET
}  // namespace fastmp
