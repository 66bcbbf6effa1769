#include "../loops.h"
#include "../vectors/neon.h"

namespace u2moe {
extern const InstructionSet kNeonDot;
const InstructionSet kNeonDot = loops_of<Neon>();
}  // namespace u2moe
