// The choice of experts.
#pragma once
#include "functions.h"
#include "lanes.h"

namespace {

// Logits of one token; four sums, of every fourth input each, hide the latency of additions.
template <class V>
inline void logits_of(const Routing& r, const float* x, float* logits) {
  const size_t width = rounded_up(r.experts, kPanel);
  for (size_t e = 0; e < width; e += kPanel) {
    const float* gate = r.gate + e;
    typename V::Floats sum[4];
    U2MOE_UNROLL for (int i = 0; i < 4; i++) sum[i] = V::set(0.0f);
    size_t d = 0;
    for (; d + 4 <= r.dim; d += 4) {
      U2MOE_UNROLL for (int i = 0; i < 4; i++) sum[i] = V::fma(V::set(x[d + i]), V::load(gate + (d + i) * width), sum[i]);
    }
    for (; d < r.dim; d++) sum[0] = V::fma(V::set(x[d]), V::load(gate + d * width), sum[0]);
    V::store(logits + e, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  }
}

// The largest logits first, the lower number first if they are equal; NaN only if there is nothing else.
inline void choose(const Routing& r, float* logits, uint32_t* expert, float* values) {
  bool is_taken[kMostExperts] = {};
  for (size_t j = 0; j < r.top_k; j++) {
    size_t best = r.experts;
    for (size_t e = 0; e < r.experts; e++)
      if (!is_taken[e] && (best == r.experts || logits[e] > logits[best] || logits[best] != logits[best])) best = e;
    is_taken[best] = true;
    expert[j] = static_cast<uint32_t>(best);
    values[j] = logits[best];
  }
}

template <class V>
void route(const Routing& r, size_t first, size_t last) {
  alignas(64) float logits[kMostExperts], shares[kMostExperts];
  for (size_t token = first; token < last; token++) {
    uint32_t* expert = r.expert + token * r.top_k;
    logits_of<V>(r, r.x + token * r.dim, logits);
    choose(r, logits, expert, shares);
    const auto highest = V::set(shares[0]);
    for (size_t j = 0; j < r.top_k; j += kPanel) {
      const auto values = load_part<V>(shares + j, r.top_k - j);
      store_part<V>(shares + j, exponential<V>(V::sub(values, highest)), r.top_k - j);
    }
    float sum = 0;
    for (size_t j = 0; j < r.top_k; j++) sum += shares[j];
    for (size_t j = 0; j < r.top_k; j++) shares[j] /= sum;
    std::memcpy(r.share + token * r.top_k, shares, r.top_k * sizeof(float));
  }
}

}  // namespace
