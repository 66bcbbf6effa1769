// Attention to a cache and to the chunk itself.
#pragma once
#include "functions.h"
#include "lanes.h"

namespace {

constexpr size_t kKeysAtOnce = 8;

// Copies the rows of one head, first from the cache and then from this call. Adds `extra` to them unless it is null.
template <class V>
inline void rows_of_head(const float* past, size_t num_past, size_t past_stride, const float* now, size_t num_now,
                         size_t now_stride, const float* extra, size_t extra_stride, size_t size, float* to) {
  const size_t last = size < kPanel ? 0 : size - kPanel;  // start of the last vector, which may overlap the one before
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

// Adds biases to the scores [keys, 16] of 16 queries. Then replaces each score by the exponential of its difference
// from the query's highest score. Returns the sum of the exponentials for each query.
template <class V>
inline typename V::Floats exponentials(const Attention& a, const float* bias, size_t first, float* scores) {
  const size_t keys = a.num_past + a.time;
  auto highest = V::set(-3.40282347e+38f);
  for (size_t j = 0; j < keys; j++) {
    auto own = V::set(bias[j]);
    if (a.bias_time_stride != 0) {  // each query has its own bias
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

// Computes one head of one batch element. Lanes are queries, so only queries and results are transposed.
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
  float* values = own_keys + keys * size;  // values of this call
  float* query = values + a.time * size;   // [size, 16]
  float* result = query + size * kPanel;  // [size, 16]
  float* scores = result + size * kPanel;  // [keys, 16]
  rows_of_head<V>(past, a.num_past, 2 * size, now, a.time, kv_width, positions, width, size, own_keys);
  rows_of_head<V>(nullptr, 0, 0, now + size, a.time, kv_width, nullptr, 0, size, values);
  const float* ahead = past + a.num_past * 2 * size;  // cache of the next head, to be prefetched
  for (size_t first = 0; first < a.time; first += kPanel) {
    const size_t count = a.time - first < kPanel ? a.time - first : kPanel;
    const float* from = a.query + (batch * a.time + first) * width + head * size;
    std::memset(query, 0, size * kPanel * sizeof(float));
    for (size_t i = 0; i < count; i++)
      for (size_t d = 0; d < size; d++) query[d * kPanel + i] = from[i * width + d];
    for (size_t row = 0; row < keys; row += kKeysAtOnce) {
      if (first == 0 && row < a.num_past)
        for (size_t i = 0; i < kKeysAtOnce * 2 * size; i += kPanel) U2MOE_PREFETCH(ahead + row * 2 * size + i, 2);
      const size_t some = keys - row < kKeysAtOnce ? keys - row : kKeysAtOnce;
      products<V>(some, own_keys + row * size, size, 1, query, size, scores + row * kPanel);
    }
    const auto inverse = V::div(V::set(1.0f), exponentials<V>(a, bias, first, scores));
    products<V>(size, past + size, 1, 2 * size, scores, a.num_past, result);
    products<V>(size, values, 1, size, scores + a.num_past * kPanel, a.time, result, true);
    float* to = a.out + (batch * a.time + first) * width + head * size;
    for (size_t d = 0; d < size; d++) {
      float lanes[kPanel];
      V::store(lanes, V::mul(V::load(result + d * kPanel), inverse));
      for (size_t i = 0; i < count; i++) to[i * width + d] = lanes[i];
    }
  }
}

}  // namespace
