// The loops of every instruction set that compute in floats alone, written once over its vectors V.
//
// Lanes are independent or added in one order, so that results are equal to the last bit; see loops.h.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "functions.h"
#include "instruction_set.h"
#include "layout.h"

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

// out[m] = the sum over i of a[m * row_stride + i * step] * b[i], for `rows` vectors; at most 8 at a time, whose
// addresses stay in registers.
template <class V, int M = static_cast<int>(V::kRows < 8 ? V::kRows : 8)>
inline void products(size_t rows, const float* a, size_t row_stride, size_t step, const float* b, size_t count,
                     float* out) {
  size_t row = 0;
  for (; row + M <= rows; row += M) {
    const float* own[M];
    typename V::Floats sums[M];
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      own[m] = a + (row + m) * row_stride;
      sums[m] = V::set(0.0f);
    }
    for (size_t i = 0; i < count; i++) {
      const auto vector = V::load(b + i * kPanel);
      U2MOE_UNROLL for (int m = 0; m < M; m++) sums[m] = V::fma(V::set(own[m][i * step]), vector, sums[m]);
    }
    U2MOE_UNROLL for (int m = 0; m < M; m++) V::store(out + (row + m) * kPanel, sums[m]);
  }
  if constexpr (M > 1) {
    if (row < rows)
      products<V, M / 2>(rows - row, a + row * row_stride, row_stride, step, b, count, out + row * kPanel);
  }
}

// ------------------------------------------------------------------------------------------------ attention

// Rows of one head, one after the other: from the cache, then from this call; `extra` is added if there is any.
template <class V>
inline void rows_of_head(const float* past, size_t num_past, size_t past_stride, const float* now, size_t num_now,
                         size_t now_stride, const float* extra, size_t extra_stride, size_t size, float* to) {
  const size_t last = size < kPanel ? 0 : size - kPanel;  // of a vector, which may overlap the one before
  for (size_t row = 0; row < num_past + num_now; row++, to += size) {
    const float* from = row < num_past ? past + row * past_stride : now + (row - num_past) * now_stride;
    for (size_t next = 0; next < size; next += kPanel) {
      const size_t i = next < last ? next : last;
      auto x = load_part<V>(from + i, size - i);
      if (extra != nullptr) x = V::add(x, load_part<V>(extra + row * extra_stride + i, size - i));
      store_part<V>(to + i, x, size - i);
    }
  }
}

// Scores [keys] of 16 queries, with their biases, to exponentials; returns their sums.
template <class V>
inline typename V::Floats exponentials(const Attention& a, const float* bias, size_t first, float* scores) {
  const size_t keys = a.num_past + a.time;
  auto highest = V::set(-3.40282347e+38f);
  for (size_t j = 0; j < keys; j++) {
    auto own = V::set(bias[j]);
    if (a.bias_time_stride != 0) {  // a bias for each query
      float lanes[kPanel] = {};
      for (size_t i = first; i < a.time && i < first + kPanel; i++) lanes[i - first] = bias[i * a.bias_time_stride + j];
      own = V::load(lanes);
    }
    const auto score = V::add(V::load(scores + j * kPanel), own);
    highest = V::max(highest, score);
    V::store(scores + j * kPanel, score);
  }
  auto sum = V::set(0.0f);
  const auto least = V::set(-87.0f), zero = V::set(0.0f);
  for (size_t j = 0; j < keys; j++) {
    const auto below = V::sub(V::load(scores + j * kPanel), highest);
    const auto share = V::select_less(below, least, zero, exponential<V>(below));
    sum = V::add(sum, share);
    V::store(scores + j * kPanel, share);
  }
  return sum;
}

// One head of one row of the batch. Lanes are queries, so that only they and the results are transposed.
template <class V>
void attend(const Attention& a, size_t index, float* scratch) {
  const size_t batch = index / a.heads, head = index % a.heads, size = a.size, keys = a.num_past + a.time;
  const size_t shared = head / (a.heads / a.kv_heads), width = a.heads * size, kv_width = a.kv_heads * 2 * size;
  const float* past = a.past + (batch * a.kv_heads + shared) * a.num_past * 2 * size;
  const float* now = a.key_value + batch * a.time * kv_width + shared * 2 * size;
  const float* positions =
      a.positions ? a.positions + batch * a.positions_batch_stride + head * size : nullptr;
  const float* bias = a.bias + batch * a.bias_batch_stride + head * a.bias_head_stride;
  float* own_keys = scratch;
  float* values = own_keys + keys * size;
  float* query = values + keys * size;   // [size, 16]
  float* result = query + size * kPanel;  // [size, 16]
  float* scores = result + size * kPanel;  // [keys, 16]
  rows_of_head<V>(past, a.num_past, 2 * size, now, a.time, kv_width, positions, width, size, own_keys);
  rows_of_head<V>(past + size, a.num_past, 2 * size, now + size, a.time, kv_width, nullptr, 0, size, values);
  for (size_t first = 0; first < a.time; first += kPanel) {
    const size_t count = a.time - first < kPanel ? a.time - first : kPanel;
    const float* from = a.query + (batch * a.time + first) * width + head * size;
    std::memset(query, 0, size * kPanel * sizeof(float));
    for (size_t i = 0; i < count; i++)
      for (size_t d = 0; d < size; d++) query[d * kPanel + i] = from[i * width + d];
    products<V>(keys, own_keys, size, 1, query, size, scores);
    const auto inverse = V::div(V::set(1.0f), exponentials<V>(a, bias, first, scores));
    products<V>(size, values, 1, size, scores, keys, result);
    float* to = a.out + (batch * a.time + first) * width + head * size;
    for (size_t d = 0; d < size; d++) {
      float lanes[kPanel];
      V::store(lanes, V::mul(V::load(result + d * kPanel), inverse));
      for (size_t i = 0; i < count; i++) to[i * width + d] = lanes[i];
    }
  }
}

// ------------------------------------------------------------------------------------------------ normalisation

// The sum of the lanes, always in this order.
template <class V>
inline float sum_of_lanes(typename V::Floats x) {
  float lanes[kPanel];
  V::store(lanes, x);
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// One row; `to` may be `x`.
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

// ------------------------------------------------------------------------------------------------ convolution over time

template <class V>
void see(const TimeConvolution& c, size_t first, size_t last) {
  const size_t past = c.kernel - 1, frames = past + c.time;
  for (size_t row = first; row < last; row++) {
    const size_t batch = row / frames, frame = row % frames;
    float* to = c.seen + row * c.width;
    const bool is_past = frame < past;
    const size_t at = is_past ? (batch * past + frame) * c.channels : (batch * c.time + frame - past) * c.channels;
    for (size_t i = 0; i < c.channels; i += kPanel) {
      const size_t count = c.channels - i;
      V::store(to + i, is_past ? load_part<V>(c.past + at + i, count)
                               : V::mul(load_part<V>(c.linear + at + i, count),
                                        sigmoid<V>(load_part<V>(c.gate + at + i, count))));
    }
  }
}

// One panel of M frames that follow each other.
template <class V, int M = 4>
inline void depthwise(const TimeConvolution& c, size_t frames, const float* seen, size_t panel, float* out) {
  if constexpr (M > 1) {
    if (frames < M) return depthwise<V, M - 1>(c, frames, seen, panel, out);
  }
  typename V::Floats sums[M];
  U2MOE_UNROLL for (int m = 0; m < M; m++) sums[m] = V::load(c.bias + panel);
  for (size_t k = 0; k < c.kernel; k++) {
    const auto weight = V::load(c.weight + k * c.width + panel);
    U2MOE_UNROLL for (int m = 0; m < M; m++)
      sums[m] = V::fma(weight, V::load(seen + (k + m) * c.width + panel), sums[m]);
  }
  U2MOE_UNROLL for (int m = 0; m < M; m++) store_part<V>(out + m * c.channels + panel, sums[m], c.channels - panel);
}

template <class V>
void convolve_in_time(const TimeConvolution& c, size_t first, size_t last) {
  constexpr size_t kFrames = 4;
  for (size_t row = first, count; row < last; row += count) {
    const size_t batch = row / c.time, frame = row % c.time;
    count = c.time - frame < last - row ? c.time - frame : last - row;
    if (count > kFrames) count = kFrames;
    const float* seen = c.seen + (batch * (c.kernel - 1 + c.time) + frame) * c.width;
    float* out = c.out + row * c.channels;
    for (size_t panel = 0; panel < c.channels; panel += kPanel) depthwise<V>(c, count, seen, panel, out);
    for (size_t m = 0; m < count; m++, out += c.channels) {
      if (c.norm_weight) normalize_row<V>(out, c.channels, c.norm_weight, c.norm_bias, c.epsilon, out);
      if (!c.is_activated) continue;
      for (size_t i = 0; i < c.channels; i += kPanel)
        store_part<V>(out + i, activate<V>(load_part<V>(out + i, c.channels - i), c.activation), c.channels - i);
    }
  }
}

}  // namespace
