// Operator for the convolution module of a streamed block, without the module's projections. It has a cache of earlier
// frames.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "inputs.h"
#include "parameters.h"

namespace u2moe {

class CachedConvolution {
 public:
  static constexpr const char* kName = names::kCachedConvolution;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat, kFloat};
  explicit CachedConvolution(Node& node) : isa_(isa()) {
    layer_.kernel = static_cast<size_t>(node.integer("kernel", 2, kMostKernel));
    const std::string activation = node.text("activation");
    layer_.is_activated = !activation.empty();
    if (layer_.is_activated) layer_.activation = activation_named(activation);
    const bool has_bias = node.integer("bias", 0, 1) != 0, is_normalized = node.integer("norm", 0, 1) != 0;
    layer_.epsilon = node.number("epsilon", 0, 1);
    for (int i = 0; i < 4; i++) node.skip();
    std::vector<int64_t> shape;
    const auto* weight = node.constant<float>("weight", {-1, 1, 1, static_cast<int64_t>(layer_.kernel)}, &shape);
    layer_.channels = static_cast<size_t>(shape[0]);
    const auto* bias = has_bias ? node.constant<float>("bias", {shape[0]}) : nullptr;
    const float* norm[2] = {};
    if (is_normalized)
      for (const float*& own : norm) own = node.constant<float>("normalisation", {shape[0]});
    check_all_read(node);
    pack(weight, bias, norm);
  }

  void compute(const Call& call) const {
    TimeConvolution c = layer_;
    const Tensor linear = call.input(0, kFloat), gate = call.input(1, kFloat), cache = call.input(2, kFloat);
    const auto channels = static_cast<int64_t>(c.channels), past = static_cast<int64_t>(c.kernel - 1);
    check(linear, 0, {-1, -1, channels});
    check(gate, 1, linear.shape);
    check(cache, 2, {-1, linear.shape[0], past, channels});
    c.batch = linear.axis(0);
    c.time = linear.axis(1);
    c.linear = linear.as<float>();
    c.gate = gate.as<float>();
    c.past = block_of(call, cache, 2);
    c.out = static_cast<float*>(call.output(0, linear.shape));
    auto* kept = static_cast<float*>(call.output(1, {1, linear.shape[0], past, channels}));
    run_time_convolution(isa_, c, kept, CallThreads(call));
  }

 private:
  static constexpr int64_t kMostKernel = 1024;

  // Packs the weight as [taps, channels]. A missing bias counts as 0.
  void pack(const float* weight, const float* bias, const float* const (&norm)[2]) {
    const size_t channels = layer_.channels, kernel = layer_.kernel, width = rounded_up(channels, kPanel);
    layer_.width = width;
    parameters_ = Weights((kernel + 3) * width * sizeof(float));
    auto* to = reinterpret_cast<float*>(parameters_.data());
    std::memset(to, 0, (kernel + 3) * width * sizeof(float));
    for (size_t k = 0; k < kernel; k++)
      for (size_t c = 0; c < channels; c++) to[k * width + c] = weight[c * kernel + k];
    layer_.weight = to;
    layer_.bias = to += kernel * width;
    if (bias != nullptr) std::memcpy(to, bias, channels * sizeof(float));
    if (norm[0] == nullptr) return;
    layer_.norm_weight = std::copy_n(norm[0], channels, to + width) - channels;
    layer_.norm_bias = std::copy_n(norm[1], channels, to + 2 * width) - channels;
  }

  const InstructionSet& isa_;
  TimeConvolution layer_{};
  Weights parameters_;
};

}  // namespace u2moe
