#include "../loops.h"
#include "../vectors/avx2.h"

namespace u2moe {
extern const InstructionSet kAvx2;
const InstructionSet kAvx2 = loops_of<Avx2>();
}  // namespace u2moe
