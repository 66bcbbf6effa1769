#include "../loops.h"
#include "../vectors/scalar.h"

namespace u2moe {
extern const InstructionSet kScalar;
const InstructionSet kScalar = loops_of<Scalar>();
}  // namespace u2moe
