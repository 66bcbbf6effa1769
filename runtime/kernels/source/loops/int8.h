// Products in int8.
#pragma once
#include "product.h"

namespace {

// Prefetching of weights. If there are several tiles of rows, each prefetches some cache lines of the next block. With
// a single tile, the processor's own prefetching is enough, except for the constants and the first lines after a jump.
// More prefetching makes this case slower.
struct Ahead {
  const uint8_t* next;
  size_t mask;  // each step whose number has none of these bits set prefetches a line of `next`
};

template <class V, int M>
using Sums = typename V::Ints[M][V::kPanels];

template <class V, int M>
inline void start_sums(Sums<V, M>& sum) {
  U2MOE_UNROLL for (int p = 0; p < static_cast<int>(V::kPanels); p++) {
    U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m][p] = V::seti(0);
  }
}

// Adds the products of activations and four rows of weights to the sums.
template <class V, int M>
inline void add_products(Sums<V, M>& sum, const typename V::Weights (&w)[V::kPanels], const typename V::Code* codes,
                         size_t stride) {
  U2MOE_UNROLL for (int m = 0; m < M; m++) {
    const auto four = V::four(codes + m * stride);
    U2MOE_UNROLL for (int p = 0; p < static_cast<int>(V::kPanels); p++) sum[m][p] = V::dot(sum[m][p], w[p], four);
  }
}

// Stores the corrected sums times the scales. `constants` points to the scales of the panels. The scales and the
// correction follow the weights in memory. The correction is added last, so that summation does not have to
// wait until it is read.
template <class V, int M>
inline void store_sums(Sums<V, M>& sum, const uint8_t* constants, float* unit) {
  U2MOE_UNROLL for (int p = 0; p < static_cast<int>(V::kPanels); p++) {
    const auto scale = V::load(reinterpret_cast<const float*>(constants) + p * kPanel);
    if constexpr (V::kZero != 0) {
      const auto correction = V::loadi(reinterpret_cast<const int32_t*>(constants + kBlock * 4) + p * kPanel);
      U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m][p] = V::addi(sum[m][p], correction);
    }
    U2MOE_UNROLL for (int m = 0; m < M; m++)
      V::store(unit + m * kBlock + p * kPanel, V::mul(V::to_float(sum[m][p]), scale));
  }
}

// Multiplies M rows by the panels of a tile. `weights` points to the weights of the panels, and `constants` to their
// scales, as in `store_sums`.
template <class V, int M>
inline void tile8(const typename V::Code* codes, size_t stride, const uint8_t* weights, size_t steps,
                  const uint8_t* constants, Ahead ahead, float* unit) {
  constexpr int P = V::kPanels;
  typename V::Ints sum[M][P];
  start_sums<V, M>(sum);
  for (size_t s = 0; s < steps; s++) {
    if ((s & ahead.mask) == 0) {
      U2MOE_PREFETCH(ahead.next, 2);
      ahead.next += kLine;
    }
    if (V::kFar8 > 0 && ahead.mask == SIZE_MAX)
      for (size_t i = 0; i < kBlock * 4; i += kLine) U2MOE_PREFETCH(weights + V::kFar8 + i, 2);
    typename V::Weights w[P];
    U2MOE_UNROLL for (int p = 0; p < P; p++) w[p] = V::load_weights(weights + p * kPanel * 4);
    weights += kBlock * 4;
    add_products<V, M>(sum, w, codes + s * 4, stride);
  }
  store_sums<V, M>(sum, constants, unit);
}

template <class V, int M = static_cast<int>(V::kRows)>
inline void rows8(size_t rows, const typename V::Code* codes, size_t stride, const uint8_t* weights, size_t steps,
                  const uint8_t* constants, Ahead ahead, float* unit) {
  if constexpr (M > 1) {
    if (rows < M) return rows8<V, M - 1>(rows, codes, stride, weights, steps, constants, ahead, unit);
  }
  tile8<V, M>(codes, stride, weights, steps, constants, ahead, unit);
}

// If the instructions of V add pairs of products in 16 bits, blocks with sums that do not fit use wider instructions.
template <class V>
inline void any_rows8(size_t rows, const typename V::Code* codes, size_t stride, const uint8_t* weights, size_t steps,
                      const uint8_t* constants, bool pairs_fit, Ahead ahead, float* unit) {
  constexpr int M = static_cast<int>(V::kRows);
  if (pairs_fit) return rows8<V, M>(rows, codes, stride, weights, steps, constants, ahead, unit);
  rows8<typename V::Wide, M>(rows, codes, stride, weights, steps, constants, ahead, unit);
}

template <class V>
void multiply8(const Product& p, size_t first, size_t last) {
  if (p.rows == 0) return;
  const auto* codes = static_cast<const typename V::Code*>(p.codes);
  const size_t each = tile_rows(p.rows, V::kRows), tiles = (p.rows + each - 1) / each;
  // a single tile also reads the zeros that pad the rows of a block: the processor prefetches better if reads have no
  // gaps
  const size_t steps = tiles == 1 ? depth8(p.k) / 4 : (p.k + 3) / 4, bytes = block_bytes8(p.k);
  constexpr size_t kWidth = V::kPanels * kPanel;  // columns of a tile
  // number of steps per prefetched line, chosen so that all tiles of a block together prefetch the whole next block
  size_t interval = 1;
  while (interval * 2 * bytes <= tiles * (kBlock / kWidth) * steps * kLine) interval *= 2;
  const size_t mask = tiles == 1 ? SIZE_MAX : interval - 1;
  alignas(64) float unit[V::kRows * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const uint8_t* constants = weights + depth8(p.k) * kBlock;
    for (size_t i = 0; i < 12 * kBlock + kLine; i += kLine) U2MOE_PREFETCH(constants + i, 3);
    if (tiles == 1 && block + 1 == last && p.after != nullptr)
      for (size_t i = 0; i < kNear; i += kLine) U2MOE_PREFETCH(p.after + i, 2);
    const bool pairs_fit = pairs_fit8(constants);
    Ahead ahead{p.next ? p.next + (block - first) * bytes : weights + bytes, mask};
    const auto* bias = reinterpret_cast<const float*>(constants + kBlock * 8);
    for (size_t c = 0; c < kBlock; c += kWidth) {  // columns are the outer loop: their weights stay in the cache
      for (size_t row = 0; row < p.rows; row += each) {
        const size_t rows = p.rows - row < each ? p.rows - row : each;
        const auto* own = codes + row * p.stride;
        any_rows8<V>(rows, own, p.stride, weights + c * 4, steps, constants + c * 4, pairs_fit, ahead, unit);
        ahead.next += (steps + interval - 1) / interval * kLine;
        finish<V>(p, row, rows, block * kBlock + c, kWidth, unit, bias + c);
      }
    }
  }
}

}  // namespace
