// Layer normalisation of rows. The rows of a branch, if any, are added first.
#pragma once
#include <cmath>

#include "lanes.h"

namespace {

// Normalises one row; `to` may be `x`.
template <class V>
inline void normalize_row(const float* x, size_t size, const float* weight, const float* bias, float epsilon, float* to) {
  const auto each = V::set(1.0f / static_cast<float>(size));
  auto sum = V::set(0.0f), squares = sum;
  for (size_t i = 0; i < size; i += kPanel) sum = V::add(sum, load_part<V>(x + i, size - i));
  const auto mean = V::mul(V::set(sum_of_lanes<V>(sum)), each);
  for (size_t i = 0; i < size; i += kPanel) {
    auto off = V::sub(load_part<V>(x + i, size - i), mean);
    if (size - i < kPanel) {  // lanes beyond the row stay 0
      float part[kPanel] = {};
      store_part<V>(part, off, size - i);
      off = V::load(part);
    }
    squares = V::fma(off, off, squares);
  }
  const float variance = sum_of_lanes<V>(squares) * (1.0f / static_cast<float>(size));
  const auto inverse = V::set(1.0f / sqrtf(variance + epsilon));
  for (size_t i = 0; i < size; i += kPanel) {
    const size_t count = size - i;
    const auto unit = V::mul(V::sub(load_part<V>(x + i, count), mean), inverse);
    store_part<V>(to + i, V::fma(unit, load_part<V>(weight + i, count), load_part<V>(bias + i, count)), count);
  }
}

template <class V>
void normalize(const Normalization& n, size_t first, size_t last) {
  for (size_t row = first; row < last; row++) {
    const float* x = n.x + row * n.size;
    if (n.branch != nullptr) {
      const float* branch = n.branch + row * n.size;
      float* sum = n.sum + row * n.size;
      for (size_t i = 0; i < n.size; i += kPanel)
        store_part<V>(sum + i, V::add(load_part<V>(x + i, n.size - i), load_part<V>(branch + i, n.size - i)), n.size - i);
      x = sum;
    }
    normalize_row<V>(x, n.size, n.weight, n.bias, n.epsilon, n.out + row * n.size);
  }
}

}  // namespace
