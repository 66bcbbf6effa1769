// Code that all integer products share: the processing of results, and the division of rows into tiles.
#pragma once
#include "functions.h"
#include "lanes.h"

#ifndef U2MOE_NEAR
#define U2MOE_NEAR 4096
#endif

namespace {

constexpr size_t kNear = U2MOE_NEAR;  // bytes by which the first reader of weights prefetches ahead

// Completes elements of a matrix product as `Product::then` specifies: `rows` rows, starting at row `row`, and at most
// `width` columns, starting at column `first`. `unit` contains these elements times the scales of their columns.
template <class V>
inline void finish(const Product& p, size_t row, size_t rows, size_t first, size_t width, const float* unit,
                   const float* bias) {
  if (first >= p.n) return;
  const size_t columns = p.n - first < width ? p.n - first : width;
  for (size_t m = row; m < row + rows; m++, unit += kBlock) {
    const auto scale = V::set(p.scale ? p.scale[m] : 1.0f);
    if (p.then == Then::scatter) {
      float* to = p.out + p.token[m] * p.out_stride + first;
      const auto share = V::set(p.share[m]);
      for (size_t c = 0; c < columns; c += kPanel) {
        const auto sum = V::fma(scale, V::load(unit + c), load_part<V>(to + c, columns - c));
        store_part<V>(to + c, V::fma(share, V::load(bias + c), sum), columns - c);
      }
    } else {
      float* to = p.out + m * p.out_stride + first;
      for (size_t c = 0; c < columns; c += kPanel) {
        auto y = V::add(V::mul(V::load(unit + c), scale), V::load(bias + c));
        if (p.then == Then::hidden) y = activate<V>(y, p.activation);
        if (p.then == Then::gated) y = V::mul(load_part<V>(to + c, columns - c), y);
        store_part<V>(to + c, y, columns - c);
      }
    }
  }
}

// Returns the number of rows in a tile, at most `most`. Rows are divided evenly into as few tiles as possible.
inline size_t tile_rows(size_t rows, size_t most) {
  const size_t tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

}  // namespace
