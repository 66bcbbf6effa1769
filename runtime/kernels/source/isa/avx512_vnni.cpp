#include "../loops.h"
#include "../vectors/avx512.h"

namespace u2moe {
extern const InstructionSet kAvx512;
const InstructionSet kAvx512 = loops_of<Avx512>();
}  // namespace u2moe
