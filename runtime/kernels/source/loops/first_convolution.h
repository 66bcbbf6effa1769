// The front end's first convolution, computed in floats.
#pragma once
#include "rounding.h"

namespace {

// relu: negative values become 0.
template <class V>
void convolve(const Convolution& c, float* sums) {
  const size_t panels = (c.channels + kPanel - 1) / kPanel, vectors = panels * c.positions;
  for (size_t p = 0; p < panels; p++)
    products<V>(c.positions, c.patches, c.taps, 1, c.weights + p * c.taps * kPanel, c.taps, sums + p * c.positions * kPanel);
  const auto zero = V::set(0.0f);
  auto most = V::magnitude_bits(zero);
  for (size_t i = 0; i < vectors; i++)
    most = V::maxi(most, V::magnitude_bits(V::max(zero, V::load(sums + i * kPanel))));
  const int32_t bits = V::largest(most);
  float peak;
  std::memcpy(&peak, &bits, 4);
  *c.scale = peak * (1.0f / 255);
  const Divisor<V> by(*c.scale > 0 ? *c.scale : 1.0f);
  auto* codes = static_cast<typename V::Code*>(c.codes);
  for (size_t p = 0; p < panels; p++) {
    const size_t first = p * kPanel, count = c.channels - first < kPanel ? c.channels - first : kPanel;
    for (size_t i = 0; i < c.positions; i++) {
      const auto v = by.divide(V::max(zero, V::load(sums + (p * c.positions + i) * kPanel)));
      typename V::Code whole[kPanel];
      auto* to = codes + i * c.channels + first;
      V::store_codes(V::round(v), count < kPanel ? whole : to);
      if (count < kPanel) std::memcpy(to, whole, count * sizeof *to);
    }
  }
}

}  // namespace
