// The choice of experts.
#pragma once
#include "functions.h"
#include "lanes.h"

namespace {

// Computes the logits of M tokens in one pass over the gate. The logits of consecutive tokens are
// kMostExperts apart. Four sums per token, each over every fourth input, hide the latency of additions.
template <class V, int M>
inline void logits_of(const Routing& r, const float* x, float* logits) {
  const size_t width = rounded_up(r.experts, kPanel);
  for (size_t e = 0; e < width; e += kPanel) {
    const float* gate = r.gate + e;
    typename V::Floats sum[M][4];
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      U2MOE_UNROLL for (int i = 0; i < 4; i++) sum[m][i] = V::set(0.0f);
    }
    const auto add = [&](size_t d, int i) {
      const auto weights = V::load(gate + d * width);
      U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m][i] = V::fma(V::set(x[m * r.dim + d]), weights, sum[m][i]);
    };
    size_t d = 0;
    for (; d + 4 <= r.dim; d += 4) {
      U2MOE_UNROLL for (int i = 0; i < 4; i++) add(d + i, i);
    }
    for (; d < r.dim; d++) add(d, 0);
    U2MOE_UNROLL for (int m = 0; m < M; m++)
      V::store(logits + m * kMostExperts + e, V::add(V::add(sum[m][0], sum[m][1]), V::add(sum[m][2], sum[m][3])));
  }
}

// Chooses the experts with the largest logits. If logits are equal, the expert with the lower index comes first. Logits
// that are NaN are chosen only if no others are left.
inline void choose(const Routing& r, const float* logits, uint32_t* expert, float* values) {
  for (size_t e = 0; e < r.experts; e++) {
    size_t place = e < r.top_k ? e : r.top_k;  // among those chosen so far, which are sorted
    for (; place > 0 && (logits[e] > values[place - 1] || values[place - 1] != values[place - 1]); place--) {
      if (place == r.top_k) continue;
      expert[place] = expert[place - 1];
      values[place] = values[place - 1];
    }
    if (place == r.top_k) continue;
    expert[place] = static_cast<uint32_t>(e);
    values[place] = logits[e];
  }
}

template <class V>
void route(const Routing& r, size_t first, size_t last) {
  constexpr int kTogether = V::kRows > 8 ? 4 : 1;  // tokens whose sums fit in registers
  alignas(64) float logits[kTogether * kMostExperts], shares[kMostExperts];
  size_t known = first;  // tokens before this one have logits
  for (size_t token = first; token < last; token++) {
    uint32_t* expert = r.expert + token * r.top_k;
    float* own = logits + (token - first) % kTogether * kMostExperts;
    if (token == known) {
      const float* x = r.x + token * r.dim;
      const bool is_whole = last - token >= kTogether;
      is_whole ? logits_of<V, kTogether>(r, x, own) : logits_of<V, 1>(r, x, own);
      known += is_whole ? kTogether : 1;
    }
    choose(r, own, expert, shares);
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
