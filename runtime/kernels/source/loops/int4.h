// Products in int4.
#pragma once
#include "product.h"

namespace {

constexpr size_t kRows4Step = 8;  // weights of a byte and its neighbour in the other half

// One panel: the unpacked halves serve all rows.
template <class V, int M, bool kIsNear>
inline void tile4(const Product& p, const int8_t* codes, size_t row, const uint8_t* weights, float* unit) {
  const size_t groups = groups4(p.k, p.group);
  const float* group_scale = p.group_scale + row * groups;
  const int32_t* group_sum = p.group_sum + row * groups;
  typename V::Floats total[M];
  U2MOE_UNROLL for (int m = 0; m < M; m++) total[m] = V::set(0.0f);
  for (size_t g = 0; g < groups; g++) {
    typename V::Ints sum[M];
    U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m] = V::seti(group_sum[m * groups + g]);
    const int8_t* own = codes + g * p.group;
    for (size_t k = 0; k < p.group; k += 2 * kRows4Step) {
      typename V::Sums4 sums[M];
      U2MOE_UNROLL for (int m = 0; m < M; m++) sums[m] = V::sums_from(sum[m]);
      U2MOE_UNROLL for (int half = 0; half < 2; half++) {
        if constexpr (kIsNear) U2MOE_PREFETCH(weights + kNear, 3);
        typename V::Nibbles low, high;
        V::load_nibbles(weights, low, high);
        weights += kPanel * 4;
        U2MOE_UNROLL for (int m = 0; m < M; m++) {
          sums[m] = V::dot4(sums[m], low, V::four4(own + m * p.stride));
          sums[m] = V::dot4(sums[m], high, V::four4(own + m * p.stride + 4));
        }
        own += kRows4Step;
      }
      U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m] = V::sums_to(sums[m], sum[m]);
    }
    if constexpr (kIsNear) U2MOE_PREFETCH(weights + kNear, 3);
    const auto scale = V::load(reinterpret_cast<const float*>(weights));
    weights += kPanel * 4;
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      const auto both = V::mul(scale, V::set(group_scale[m * groups + g]));
      total[m] = V::fma(V::to_float(sum[m]), both, total[m]);
    }
  }
  U2MOE_UNROLL for (int m = 0; m < M; m++) V::store(unit + m * kBlock, total[m]);
}

template <class V, bool kIsNear, int M = static_cast<int>(V::kRows4)>
inline void rows4(size_t rows, const Product& p, const int8_t* codes, size_t row, const uint8_t* weights, float* unit) {
  if constexpr (M > 1) {
    if (rows < M) return rows4<V, kIsNear, M - 1>(rows, p, codes, row, weights, unit);
  }
  tile4<V, M, kIsNear>(p, codes, row, weights, unit);
}

template <class V>
void multiply4(const Product& p, size_t first, size_t last) {
  if (p.rows == 0) return;
  const auto* codes = static_cast<const int8_t*>(p.codes);
  const size_t each = tile_rows(p.rows, V::kRows4), bytes = block_bytes4(p.k, p.group);
  alignas(64) float unit[V::kRows4 * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const auto* bias = reinterpret_cast<const float*>(weights + bytes - kBlock * 4);
    for (size_t row = 0; row < p.rows; row += each) {
      const size_t rows = p.rows - row < each ? p.rows - row : each;
      for (size_t c = 0; c < kBlock; c += kPanel) {
        const int8_t* own = codes + row * p.stride;
        const uint8_t* panel = weights + c / kPanel * panel_bytes4(p.k, p.group);
        if (row == 0)
          rows4<V, true>(rows, p, own, row, panel, unit + c);
        else
          rows4<V, false>(rows, p, own, row, panel, unit + c);
      }
      finish<V>(p, row, rows, block * kBlock, kBlock, unit, bias);
    }
  }
}

}  // namespace
