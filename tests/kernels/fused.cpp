// Count multiplications and additions whose results differ from those of the C library's function, which is exact in glibc.
#include <cstddef>
#include <cstdio>
#include <random>
#include "vectors/scalar.h"

int main() {
  std::mt19937 random;
  const auto sign = [&] { return random() & 1 ? 1.0f : -1.0f; };
  int different = 0;
  for (int i = 0; i < 2000000; i++) {
    float a, b, c;
    if (i & 1) {  // the sum is as near to the middle between two floats as it can be
      const float k = random() % 64 * 0x1p-23f;
      a = 1 + k, b = std::ldexp((1 - k) * sign(), -23 - int(random() % 3));
      c = (1 + random() % 1024 * 0x1p-23f) * sign();
    } else {  // any bits
      for (float* x : {&a, &b, &c}) { const uint32_t bits = random(); std::memcpy(x, &bits, 4); }
    }
    const float expected = std::fma(a, b, c), found = Scalar::fused(a, b, c);
    different += expected == expected ? std::memcmp(&expected, &found, 4) != 0 : found == found;
  }
  std::printf("%d\n", different);
  return 0;
}
