// Code that all integer products share: the processing of results, and the division of rows into tiles.
#pragma once
#include "functions.h"
#include "lanes.h"

#ifndef U2MOE_NEAR
#define U2MOE_NEAR 4096
#endif

namespace {

using u2moe::Then;

constexpr size_t kNear = U2MOE_NEAR;  // bytes by which the first reader of weights prefetches ahead

// Completes a vector of elements of row `m` as `then` specifies, and writes the first `left` of them to `to`. `unit` and
// `scale` are explained at `Product`.
template <class V>
inline void finish_vector(const Product& p, Then then, size_t m, typename V::Floats unit, typename V::Floats scale,
                          typename V::Floats bias, float* to, size_t left) {
  if (then == Then::scatter) {
    const auto sum = V::fma(scale, unit, load_part<V>(to, left));
    return store_part<V>(to, V::fma(V::set(p.share[m]), bias, sum), left);
  }
  auto y = V::add(V::mul(unit, scale), bias);
  if (then == Then::hidden) y = activate<V>(y, p.activation);
  if (then == Then::gated) y = V::mul(load_part<V>(to, left), y);
  store_part<V>(to, y, left);
}

// Returns where the elements of row `m` go.
inline float* row_of(const Product& p, size_t m) {
  return p.out + (p.then == Then::scatter ? p.token[m] : m) * p.out_stride;
}

// Completes elements of a matrix product as `Product::then` specifies: `rows` rows, starting at row `row`, and at most
// `width` columns, starting at column `first`. `unit` contains these elements times the scales of their columns.
template <class V>
inline void finish(const Product& p, size_t row, size_t rows, size_t first, size_t width, const float* unit,
                   const float* bias) {
  if (first >= p.n) return;
  const size_t columns = p.n - first < width ? p.n - first : width;
  for (size_t m = row; m < row + rows; m++, unit += kBlock) {
    const auto scale = V::set(p.scale ? p.scale[m] : 1.0f);
    float* to = row_of(p, m) + first;
    for (size_t c = 0; c < columns; c += kPanel)
      finish_vector<V>(p, p.then, m, V::load(unit + c), scale, V::load(bias + c), to + c, columns - c);
  }
}

// Returns the number of rows in a tile, at most `most`. Rows are divided evenly into as few tiles as possible.
inline size_t tile_rows(size_t rows, size_t most) {
  const size_t tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

}  // namespace
