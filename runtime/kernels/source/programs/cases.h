// Layers of many shapes that the programs in this folder compute. Their weights are the same on every machine.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "../layers.h"
#include "../layout.h"

namespace u2moe {

class Serial final : public Threads {
 public:
  void run(Task task, size_t count, void* state) const override {
    for (size_t i = 0; i < count; i++) task(state, i);
  }
};

// Generator of pseudorandom numbers that are the same on every machine.
class Random {
 public:
  // If `is_quantized`, the two weights of each column in rows 2i and 2i + 1 sum to at most 128 in magnitude, as after
  // `u2moe quantize`. Otherwise, about every third matrix has larger sums.
  explicit Random(uint64_t seed, bool is_quantized = false) : state_(seed * 2 + 1), is_quantized_(is_quantized) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  float number() { return static_cast<float>(static_cast<int32_t>(next() % 20001) - 10000) / 10000.0f; }
  std::vector<float> numbers(size_t count, float scale) {
    std::vector<float> all(count);
    for (float& x : all) x = number() * scale;
    return all;
  }
  std::vector<int8_t> weights(size_t k, size_t n) {
    std::vector<int8_t> all(k * n);
    for (int8_t& w : all) w = static_cast<int8_t>(static_cast<int>(next() % 255) - 127);
    if (next() % 3 == 0 && !is_quantized_) return all;
    for (size_t i = n; i + n <= all.size(); i += 2 * n)
      for (size_t c = i; c < i + n; c++)
        if (std::abs(all[c] + all[c - n]) > 128) all[c] = static_cast<int8_t>(-all[c]);
    return all;
  }

 private:
  uint64_t state_;
  bool is_quantized_;
};

// Digest of results (FNV-1a).
class Digest {
 public:
  void add(const void* data, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < bytes; i++) hash_ = (hash_ ^ p[i]) * 1099511628211u;
  }
  unsigned long long value() const { return hash_; }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

inline void pack(Random& random, size_t k, size_t n, size_t group, uint8_t* to) {
  const auto bias = random.numbers(n, 0.3f);
  if (group) {
    const size_t groups = groups4(k, group);
    std::vector<uint8_t> weight(n * groups * group / 2);
    for (uint8_t& w : weight) w = static_cast<uint8_t>(random.next());
    std::vector<uint8_t> step(n * groups);
    for (uint8_t& s : step)
      do s = static_cast<uint8_t>(random.next());
      while (!step_fits(s));
    const auto scale = random.numbers(n, 0.002f);
    pack4({weight.data(), step.data(), scale.data(), bias.data(), k, n, group}, to);
  } else {
    const auto weight = random.weights(k, n);
    const auto scale = random.numbers(n, 0.002f);
    pack8({weight.data(), scale.data(), bias.data(), k, n}, to);
  }
}

struct Case {
  size_t dim, hidden, experts, top_k, group, tokens;
  Activation activation;
  bool is_gated = false;
};

inline ExpertLayer expert_layer(const Case& c, Random& random) {
  ExpertLayer layer;
  layer.dim = c.dim;
  layer.hidden = c.hidden;
  layer.experts = c.experts;
  layer.top_k = c.top_k;
  layer.group = c.group;
  layer.activation = c.activation;
  layer.gate_bytes = c.is_gated ? packed_bytes8(c.dim, c.hidden) : 0;
  layer.first_bytes = c.group ? packed_bytes4(c.dim, c.hidden, c.group) : packed_bytes8(c.dim, c.hidden);
  layer.second_bytes = c.group ? packed_bytes4(c.hidden, c.dim, c.group) : packed_bytes8(c.hidden, c.dim);
  const size_t width = rounded_up(c.experts, kPanel);
  layer.router = Weights(c.dim * width * sizeof(float));
  auto* router = reinterpret_cast<float*>(layer.router.data());
  for (size_t i = 0; i < c.dim * width; i++) router[i] = i % width < c.experts ? random.number() : 0.0f;
  layer.weights = Weights(layer.expert_bytes() * c.experts);
  uint8_t* to = layer.weights.data();
  for (size_t e = 0; e < c.experts; e++, to += layer.expert_bytes()) {
    if (c.is_gated) pack(random, c.dim, c.hidden, 0, to);
    pack(random, c.dim, c.hidden, c.group, to + layer.gate_bytes);
    pack(random, c.hidden, c.dim, c.group, to + layer.gate_bytes + layer.first_bytes);
  }
  return layer;
}

inline void compute_experts(const InstructionSet& isa, const Case& c, const Threads& threads, Digest& digest) {
  Random random(c.dim * 31 + c.hidden * 7 + c.tokens);
  const ExpertLayer layer = expert_layer(c, random);
  const auto x = random.numbers(c.tokens * c.dim, 2.0f);
  std::vector<float> y(x.size());
  run_experts(isa, layer, x.data(), c.tokens, y.data(), threads);
  digest.add(y.data(), y.size() * sizeof(float));
}

inline void compute_linear(const InstructionSet& isa, size_t k, size_t n, size_t rows, const Threads& threads,
                           Digest& digest) {
  Random random(k + n + rows);
  LinearLayer layer;
  layer.k = k;
  layer.n = n;
  layer.weights = Weights(packed_bytes8(k, n));
  pack(random, k, n, 0, layer.weights.data());
  const auto x = random.numbers(rows * k, 3.0f);
  std::vector<float> y(rows * n), scale(rows);
  run_linear(isa, layer, x.data(), rows, y.data(), threads);
  digest.add(y.data(), y.size() * sizeof(float));
  std::vector<uint8_t> q(rows * k);
  run_rows(isa, x.data(), rows, k, 0.0f, q.data(), scale.data(), threads);
  digest.add(q.data(), q.size());
  run_matmul(isa, layer, q.data(), scale.data(), rows, y.data(), threads);
  digest.add(y.data(), y.size() * sizeof(float));
}

inline void compute_attention(const InstructionSet& isa, size_t time, size_t size, size_t num_past, bool relative,
                              const Threads& threads, Digest& digest) {
  Random random(time + size + num_past);
  Attention a{};
  a.batch = 2;
  a.time = time;
  a.heads = 4;
  a.kv_heads = 2;
  a.size = size;
  a.num_past = num_past;
  const size_t keys = num_past + time, width = a.heads * size;
  const auto query = random.numbers(a.batch * time * width, 1.0f);
  const auto key_value = random.numbers(a.batch * time * a.kv_heads * 2 * size, 1.0f);
  const auto past = random.numbers(a.batch * a.kv_heads * num_past * 2 * size, 1.0f);
  const auto positions = random.numbers(keys * width, 1.0f), bias = random.numbers(a.batch * a.heads * keys, 3.0f);
  std::vector<float> out(query.size());
  a.query = query.data();
  a.key_value = key_value.data();
  a.past = past.data();
  a.positions = relative ? positions.data() : nullptr;
  a.bias = bias.data();
  a.bias_batch_stride = a.heads * keys;
  a.bias_head_stride = keys;
  a.out = out.data();
  run_attention(isa, a, threads);
  digest.add(out.data(), out.size() * sizeof(float));
}

// Returns two convolutions with kernels of size 3 and a stride of 2. The second has `out` output channels.
inline ConvolutionLayer convolution_layer(size_t bins, size_t channels, size_t out, bool is_quantized = false) {
  Random random(bins + channels, is_quantized);
  ConvolutionLayer layer;
  layer.bins = bins;
  layer.channels = channels;
  layer.out = out;
  for (size_t i = 0; i < 2; i++) {
    layer.kernels[i] = 3;
    layer.strides[i] = 2;
  }
  const size_t panels = rounded_up(channels, kPanel) / kPanel, count = panels * layer.taps() * kPanel;
  const auto first = random.numbers(count, 0.3f);
  layer.first = Weights(count * sizeof(float));
  std::copy(first.begin(), first.end(), reinterpret_cast<float*>(layer.first.data()));
  const auto weight = random.weights(layer.depth(), out);
  const auto scale = random.numbers(out, 0.002f), bias = random.numbers(out, 0.3f);
  layer.second = Weights(packed_bytes8(layer.depth(), out));
  pack8({weight.data(), scale.data(), bias.data(), layer.depth(), out, true}, layer.second.data());
  return layer;
}

inline void compute_convolutions(const InstructionSet& isa, size_t bins, size_t channels, size_t time,
                                 const Threads& threads, Digest& digest) {
  const ConvolutionLayer layer = convolution_layer(bins, channels, channels + 5);
  const size_t batch = 2;
  const auto x = Random(time).numbers(batch * time * bins, 2.0f);
  std::vector<float> y(batch * layer.frames(time) * layer.outer() * layer.out);
  run_convolutions(isa, layer, x.data(), batch, time, y.data(), threads);
  digest.add(y.data(), y.size() * sizeof(float));
}

inline void compute_time_convolution(const InstructionSet& isa, size_t time, size_t channels, bool is_normalized,
                                     const Threads& threads, Digest& digest) {
  Random random(time + channels);
  TimeConvolution c{};
  c.batch = 2;
  c.time = time;
  c.channels = channels;
  c.kernel = 2 + time % 15;
  c.width = rounded_up(channels, kPanel);
  const size_t size = c.batch * time * channels, past = c.batch * (c.kernel - 1) * channels;
  const auto linear = random.numbers(size, 1.0f), gate = random.numbers(size, 4.0f), cache = random.numbers(past, 1.0f);
  const auto weight = random.numbers(c.kernel * c.width, 0.5f), others = random.numbers(3 * c.width, 1.0f);
  std::vector<float> out(size), kept(past);
  c.linear = linear.data();
  c.gate = gate.data();
  c.past = cache.data();
  c.weight = weight.data();
  c.bias = others.data();
  c.norm_weight = is_normalized ? c.bias + c.width : nullptr;
  c.norm_bias = c.bias + 2 * c.width;
  c.epsilon = 1e-5f;
  c.is_activated = true;
  c.activation = is_normalized ? Activation::swish : Activation::relu;
  c.out = out.data();
  run_time_convolution(isa, c, kept.data(), threads);
  digest.add(out.data(), out.size() * sizeof(float));
  digest.add(kept.data(), kept.size() * sizeof(float));
  Normalization n{};
  n.x = linear.data();
  n.branch = gate.data();
  n.weight = c.bias;
  n.bias = c.norm_bias;
  n.size = channels;
  n.epsilon = c.epsilon;
  std::vector<float> sum(size);
  n.sum = sum.data();
  n.out = out.data();
  run_normalization(isa, n, c.batch * time, threads);
  digest.add(out.data(), out.size() * sizeof(float));
}

// Computes products of the largest activations and pairs of weights that add up to `sum`. 128 is the largest `sum` for
// which the sum of a pair's products fits in 16 bits.
inline void compute_pairs(const InstructionSet& isa, int sum, const Threads& threads, Digest& digest) {
  const size_t k = 64, n = 32, rows = 2;
  const int first = sum > 0 ? 127 : -127;
  std::vector<int8_t> weight(k * n);
  for (size_t i = 0; i < k * n; i++) weight[i] = static_cast<int8_t>(i / n % 2 ? sum - first : first);
  const std::vector<float> scale(n, 1.0f);
  LinearLayer layer;
  layer.k = k;
  layer.n = n;
  layer.weights = Weights(packed_bytes8(k, n));
  pack8({weight.data(), scale.data(), nullptr, k, n}, layer.weights.data());
  std::vector<float> x(rows * k, 1.0f), y(rows * n);
  std::fill(x.begin() + k, x.end(), -1.0f);
  run_linear(isa, layer, x.data(), rows, y.data(), threads);
  digest.add(y.data(), y.size() * sizeof(float));
}

// Returns a digest of the results of all cases.
inline unsigned long long digest_of(const InstructionSet& isa, const Threads& threads) {
  static constexpr Case kCases[] = {
      {64, 96, 8, 2, 0, 17, Activation::swish},  {70, 33, 5, 3, 0, 40, Activation::gelu},
      {16, 200, 3, 1, 0, 9, Activation::tanh},   {5, 7, 20, 4, 0, 30, Activation::selu},
      {64, 96, 8, 2, 32, 17, Activation::swish}, {70, 33, 5, 3, 16, 40, Activation::gelu},
      {130, 140, 2, 2, 64, 5, Activation::relu}, {96, 260, 2, 1, 128, 11, Activation::hardtanh},
      {72, 50, 1, 1, 32, 3, Activation::swish},  {72, 50, 1, 1, 32, 31, Activation::swish},
      {70, 150, 1, 1, 0, 33, Activation::swish, true}, {24, 40, 1, 1, 0, 3, Activation::gelu, true},
  };
  Digest digest;
  for (const Case& c : kCases) compute_experts(isa, c, threads, digest);
  for (size_t rows : {1, 2, 3, 8, 15, 29}) compute_linear(isa, 24 + 8 * rows, 40 + rows, rows, threads, digest);
  for (int sum : {128, 129, -128, -129}) compute_pairs(isa, sum, threads, digest);
  for (size_t time : {1, 7, 16, 35})
    compute_attention(isa, time, 3 + 2 * time, 50 - time, time % 2 == 1, threads, digest);
  for (size_t time : {1, 3, 16, 41}) compute_time_convolution(isa, time, 20 + 3 * time, time != 3, threads, digest);
  return digest.value();
}

// Returns a digest of the results of the front end's convolutions. It covers nothing if the instruction set leaves
// these convolutions to onnxruntime.
inline unsigned long long digest_of_convolutions(const InstructionSet& isa, const Threads& threads) {
  Digest digest;
  if (isa.holds_255)
    for (size_t time : {6, 7, 30, 90}) compute_convolutions(isa, 10 + time, 4 * (time % 9 + 1), time, threads, digest);
  return digest.value();
}

}  // namespace u2moe
