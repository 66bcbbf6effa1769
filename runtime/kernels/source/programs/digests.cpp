// Computes the same layers on every instruction set of this processor, and prints a digest of the results for each set.
// Equal digests mean that results are equal to the last bit, here and on other machines. Tests also compare digests
// under qemu.
#include <cstdio>

#include "cases.h"

int main() {
  const u2moe::InstructionSet* sets[8];
  for (size_t i = 0, count = u2moe::available(sets); i < count; i++)
    std::printf("%s %016llx\n", sets[i]->name, u2moe::digest_of(*sets[i], u2moe::Serial()));
  return 0;
}
