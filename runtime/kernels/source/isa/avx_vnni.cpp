#define U2MOE_AVX_VNNI
#include "../loops.h"
#include "../vectors/avx2.h"

namespace u2moe {
extern const InstructionSet kAvxVnni;
const InstructionSet kAvxVnni = loops_of<Avx2>();
}  // namespace u2moe
