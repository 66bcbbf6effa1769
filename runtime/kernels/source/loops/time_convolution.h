// The convolution modules of streamed blocks.
#pragma once
#include "functions.h"
#include "normalization.h"

namespace {

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

// Computes one panel of channels for M consecutive output frames, or for all `frames` if these are fewer.
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
