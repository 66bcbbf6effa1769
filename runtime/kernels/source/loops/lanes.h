// Partial vectors at the ends of rows, sums of lanes in a fixed order, and matrix products in floats.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../instruction_set.h"
#include "../layout.h"

#if defined(__GNUC__) && !defined(__clang__)
#define U2MOE_UNROLL _Pragma("GCC unroll 16")
#else
#define U2MOE_UNROLL
#endif
#if defined(__GNUC__)
#define U2MOE_PREFETCH(address, level) __builtin_prefetch(address, 0, level)
#else
#define U2MOE_PREFETCH(address, level) ((void)0)
#endif

namespace {

using namespace u2moe;

template <class V>
inline typename V::Floats load_part(const float* p, size_t count) {
  if (count >= kPanel) return V::load(p);
  float part[kPanel] = {};
  std::memcpy(part, p, count * sizeof(float));
  return V::load(part);
}

template <class V>
inline void store_part(float* p, typename V::Floats x, size_t count) {
  if (count >= kPanel) return V::store(p, x);
  float part[kPanel];
  V::store(part, x);
  std::memcpy(p, part, count * sizeof(float));
}

// Computes `rows` vectors: out[m] is the sum over i of a[m * row_stride + i * step] * b[i]. If `more`, the sum is added
// to the previous out[m]. At most 8 vectors are computed at a time, so that addresses stay in registers.
template <class V, int M = static_cast<int>(V::kRows < 8 ? V::kRows : 8)>
inline void products(size_t rows, const float* a, size_t row_stride, size_t step, const float* b, size_t count,
                     float* out, bool more = false) {
  size_t row = 0;
  for (; row + M <= rows; row += M) {
    const float* own[M];
    typename V::Floats sums[M];
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      own[m] = a + (row + m) * row_stride;
      sums[m] = more ? V::load(out + (row + m) * kPanel) : V::set(0.0f);
    }
    for (size_t i = 0; i < count; i++) {
      const auto vector = V::load(b + i * kPanel);
      U2MOE_UNROLL for (int m = 0; m < M; m++) sums[m] = V::fma(V::set(own[m][i * step]), vector, sums[m]);
    }
    U2MOE_UNROLL for (int m = 0; m < M; m++) V::store(out + (row + m) * kPanel, sums[m]);
  }
  if constexpr (M > 1) {
    if (row < rows)
      products<V, M / 2>(rows - row, a + row * row_stride, row_stride, step, b, count, out + row * kPanel, more);
  }
}

// Returns the sum of the lanes, which are always added in the same order.
template <class V>
inline float sum_of_lanes(typename V::Floats x) {
  float lanes[kPanel];
  V::store(lanes, x);
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
