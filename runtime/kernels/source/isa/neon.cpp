#include "../loops.h"
#include "../vectors/neon.h"

namespace u2moe {
extern const InstructionSet kNeon;
const InstructionSet kNeon = loops_of<Neon>();
}  // namespace u2moe
