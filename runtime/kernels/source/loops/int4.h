// Products in int4. Weights are unpacked to int8: in registers if activations have few rows, otherwise once in memory.
#pragma once
#include "int8.h"

namespace {

constexpr size_t kRows4 = 8;  // rows of weights in a step: four in the low halves of bytes, four in the high halves

// The processor's own prefetching does not keep up with unpacking. So weights are prefetched into the second-level
// cache.
constexpr ptrdiff_t kFar = 2 * kNear;
inline void prefetch4(const uint8_t* weights) { U2MOE_PREFETCH(weights, 2); }

// Multiplies all M rows by the columns of a tile. `end` is where the last block of the `multiply4` call ends.
template <class V, int M>
inline void tile4(const Product& p, const typename V::Code* codes, const uint8_t* block, size_t column,
                  const uint8_t* end, float* unit) {
  constexpr int P = V::kPanels;
  const size_t depth = depth8(p.k), groups = groups4(p.k, p.group), step_bytes = step_bytes4(p.k, p.group);
  const uint8_t* weights = block + step_bytes + column * 4;
  const uint8_t* ahead = block + column * 4;
  const ptrdiff_t jump = p.after ? p.after - end : 0;
  const uint8_t* constants = block + block_bytes4(p.k, p.group) - 12 * kBlock + column * 4;
  typename V::Ints sum[M][P];
  start_sums<V, M>(sum);
  for (size_t g = 0; g < groups; g++) {
    typename V::Steps steps[P];
    const ptrdiff_t far = end - ahead > kFar ? kFar : kFar + jump;
    prefetch4(ahead + far);  // covers part of the block's steps and constants
    ahead += kBlock * 4 / P;
    U2MOE_UNROLL for (int i = 0; i < P; i++) steps[i] = V::steps(block + g * kBlock + column + i * kPanel);
    const auto* own = codes + g * p.group;
    const size_t rows = depth - g * p.group < p.group ? depth - g * p.group : p.group;
    for (size_t k = 0; k < rows; k += kRows4) {
      typename V::Weights low[P], high[P];
      U2MOE_UNROLL for (int i = 0; i < P; i++) {
        prefetch4(ahead + far + i * kLine);
        V::unpack(weights + i * kPanel * 4, steps[i], low[i], high[i]);
      }
      ahead += kBlock * 4;
      add_products<V, M>(sum, low, own + k, p.stride);
      add_products<V, M>(sum, high, own + k + 4, p.stride);
      weights += kBlock * 4;
    }
  }
  store_sums<V, M>(sum, constants, unit);
}

template <class V, int M = static_cast<int>(V::kRows)>
inline void rows4(const Product& p, const uint8_t* block, size_t column, const uint8_t* end, float* unit) {
  if constexpr (M > 1) {
    if (p.rows < M) return rows4<V, M - 1>(p, block, column, end, unit);
  }
  tile4<V, M>(p, static_cast<const typename V::Code*>(p.codes), block, column, end, unit);
}

// Unpacks an int4 block to int8.
template <class V>
void unpack_block(const Product& p, const uint8_t* block, uint8_t* to) {
  const size_t depth = depth8(p.k), packed = groups4(p.k, p.group) * p.group;
  const uint8_t* weights = block + step_bytes4(p.k, p.group);
  for (size_t first = 0; first < packed; first += p.group) {
    typename V::Steps steps[2];
    for (size_t i = 0; i < 2; i++) steps[i] = V::steps(block + first / p.group * kBlock + i * kPanel);
    for (size_t k = first; k < first + p.group && k < depth; k += kRows4, weights += kBlock * 4) {
      for (size_t i = 0; i < 2; i++) {
        prefetch4(weights + kFar + i * kLine);
        typename V::Weights low, high;
        V::unpack(weights + i * kPanel * 4, steps[i], low, high);
        V::store_weights(low, to + k * kBlock + i * kPanel * 4);
        V::store_weights(high, to + (k + 4) * kBlock + i * kPanel * 4);
      }
    }
  }
  if (packed < depth) std::memset(to + packed * kBlock, 0, (depth - packed) * kBlock);
  std::memcpy(to + depth * kBlock, block + block_bytes4(p.k, p.group) - 12 * kBlock, 12 * kBlock);
  std::memset(to + (depth + 12) * kBlock, 0, kLine);  // `pairs` is 0: pairs of products may exceed 16 bits
}

// Multiplies rows by int4 weights. Up to `kFew` rows form one tile. For more rows, weights are unpacked to int8 for
// `multiply`.
template <class V, void (*multiply)(const Product&, size_t, size_t) = multiply8<V>, size_t kFew = V::kRows>
void multiply4(const Product& p, size_t first, size_t last) {
  constexpr size_t kWidth = V::kPanels * kPanel;
  const size_t bytes = block_bytes4(p.k, p.group);
  if (p.rows == 0) return;
  if (p.rows <= kFew) {
    alignas(64) float unit[V::kRows * kBlock];
    for (size_t block = first; block < last; block++) {
      const uint8_t* weights = p.weights + block * bytes;
      const auto* bias = reinterpret_cast<const float*>(weights + bytes - 4 * kBlock);
      for (size_t c = 0; c < kBlock; c += kWidth) {
        rows4<V>(p, weights, c, p.weights + last * bytes, unit);
        finish<V>(p, 0, p.rows, block * kBlock + c, kWidth, unit, bias + c);
      }
    }
    return;
  }
  for (size_t block = first; block < last; block += kUnpacked) {
    const size_t count = last - block < kUnpacked ? last - block : kUnpacked;
    for (size_t i = 0; i < count; i++)
      unpack_block<V>(p, p.weights + (block + i) * bytes, p.room + i * block_bytes8(p.k));
    Product eight = p;
    eight.weights = p.room;
    eight.next = p.weights + (block + count) * bytes;
    eight.out += block * kBlock;
    eight.n -= block * kBlock;
    multiply(eight, 0, count);
  }
}

}  // namespace
