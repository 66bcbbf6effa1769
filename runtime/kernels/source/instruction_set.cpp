#include "instruction_set.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define U2MOE_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace u2moe {

extern const InstructionSet kScalar;
#if defined(U2MOE_X86)
extern const InstructionSet kAvx2, kAvxVnni, kAvx512, kAmx;
#elif defined(__aarch64__)
extern const InstructionSet kNeon, kNeonDot, kNeonI8mm;
#endif

namespace {

#if defined(U2MOE_X86)
struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r{};
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(sub));
  std::memcpy(&r, values, sizeof r);
#else
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// Returns XCR0, whose bits tell which registers the operating system saves.
uint64_t saved_state() {
  if ((cpuid(1, 0).c >> 27 & 1) == 0) return 0;
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
#endif
}

bool has(uint64_t bits, uint64_t all) { return (bits & all) == all; }

[[maybe_unused]] bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

size_t find(const InstructionSet** sets) {
  const uint64_t state = saved_state();
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const bool avx2 = has(state, 0x6) && has(one.c, 1u << 12 | 1u << 28) && has(seven.b, 1u << 5);  // FMA AVX, AVX2
  const bool avx512 = avx2 && has(state, 0xE6) && has(seven.b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) &&  // F DQ BW VL
                      has(seven.c, 1u << 11);                                                                 // VNNI
#if defined(U2MOE_AMX_EMULATED)
  const bool amx = avx512;
#else
  const bool amx = avx512 && has(state, 0x60000) && has(seven.d, 1u << 24 | 1u << 25) && may_use_amx();  // TILE INT8
#endif
  size_t count = 0;
#if defined(U2MOE_AMX)
  if (amx) sets[count++] = &kAmx;
#else
  (void)amx;
#endif
  if (avx512) sets[count++] = &kAvx512;
  if (avx2 && has(seven_one.a, 1u << 4)) sets[count++] = &kAvxVnni;
  if (avx2) sets[count++] = &kAvx2;
  return count;
}
#elif defined(__aarch64__)
size_t find(const InstructionSet** sets) {
  size_t count = 0;
#if defined(__linux__)
  const bool dot = getauxval(AT_HWCAP) >> 20 & 1, i8mm = dot && (getauxval(AT_HWCAP2) >> 13 & 1);
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  const bool dot = true;
  const bool i8mm = sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value == 1;
#else
  const bool dot = false, i8mm = false;
#endif
  if (i8mm) sets[count++] = &kNeonI8mm;
  if (dot) sets[count++] = &kNeonDot;
  sets[count++] = &kNeon;
  return count;
}
#else
size_t find(const InstructionSet**) { return 0; }
#endif

struct Choice {
  const InstructionSet* sets[8] = {};
  size_t count = 0;
  const InstructionSet* chosen = nullptr;
  char message[256] = {};

  Choice() {
    count = find(sets);
    sets[count++] = &kScalar;
    const char* name = std::getenv("U2MOE_KERNELS_ISA");
    if (name == nullptr || *name == '\0') {
      chosen = sets[0];
      return;
    }
    char names[128] = {};
    for (size_t i = 0; i < count; i++) {
      if (std::strcmp(name, sets[i]->name) == 0) chosen = sets[i];
      std::strncat(names, i ? ", " : "", sizeof names - std::strlen(names) - 1);
      std::strncat(names, sets[i]->name, sizeof names - std::strlen(names) - 1);
    }
    if (chosen == nullptr)
      std::snprintf(message, sizeof message, "U2MOE_KERNELS_ISA must be one of %s on this processor, got %.64s", names,
                    name);
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const InstructionSet* instruction_set(const char** message) {
  *message = choice().message;
  return choice().chosen;
}

size_t available(const InstructionSet* (&sets)[8]) {
  std::memcpy(sets, choice().sets, sizeof sets);
  return choice().count;
}

}  // namespace u2moe
