// Operator for the two convolutions of the front end.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "parameters.h"

namespace u2moe {

class FirstConvolutions {
 public:
  static constexpr const char* kName = names::kInt8FirstConvolutions;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit FirstConvolutions(Node& node) : isa_(isa()) {
    layer_.bins = size_of(node, "bins");
    layer_.channels = size_of(node, "channels");
    node.pair("kernels", kMostKernel, layer_.kernels);
    node.pair("strides", kMostKernel, layer_.strides);
    if (layer_.bins < layer_.kernels[0] || layer_.inner() < layer_.kernels[1])
      throw Invalid("attribute bins is too small for the kernels");
    node.skip();
    const size_t given = layer_.channels;
    const auto taps = static_cast<int64_t>(layer_.taps()), channels = static_cast<int64_t>(given);
    const auto* first = node.constant<float>("first_weight", {taps, channels});
    Matrix second = read_int8(node, static_cast<int64_t>(layer_.depth()), -1, true);
    check_all_read(node);
    if (static_cast<int64_t>(layer_.bins) > kMostElements / (channels * taps)) throw Invalid("has too many elements");
    layer_.channels = rounded_up(given, 4);  // products add four channels at a time
    pack_first(first, given);
    pack_second(second.eight, given);
  }

  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.shape.size() != 3 || x.last() != layer_.bins)
      throw Invalid("input 0 must be [batch, time, " + std::to_string(layer_.bins) + "]");
    const size_t frames = layer_.frames(x.axis(1));
    auto* y = static_cast<float*>(call.output(0, {x.shape[0], static_cast<int64_t>(frames),
                                                  static_cast<int64_t>(layer_.outer()),
                                                  static_cast<int64_t>(layer_.out)}));
    run_convolutions(isa_, layer_, x.as<float>(), x.axis(0), x.axis(1), y, CallThreads(call));
  }

 private:
  static constexpr int64_t kMostKernel = 64;

  void pack_first(const float* weight, size_t channels) {
    const size_t panels = rounded_up(layer_.channels, kPanel) / kPanel;
    layer_.first = Weights(panels * layer_.taps() * kPanel * sizeof(float));
    auto* to = reinterpret_cast<float*>(layer_.first.data());
    for (size_t p = 0; p < panels; p++)
      for (size_t tap = 0; tap < layer_.taps(); tap++)
        for (size_t c = p * kPanel; c < (p + 1) * kPanel; c++)
          *to++ = c < channels ? weight[tap * channels + c] : 0.0f;
  }

  // Packs the second weight, whose rows are in the order (time, frequency, channels) in the graph.
  void pack_second(Int8Weight weight, size_t channels) {
    const size_t kernel = layer_.kernels[1], from = channels * weight.n, to = layer_.channels * weight.n;
    std::vector<int8_t> turned(layer_.depth() * weight.n);
    for (size_t t = 0; t < kernel; t++)
      for (size_t f = 0; f < kernel; f++)
        std::memcpy(turned.data() + (f * kernel + t) * to, weight.weight + (t * kernel + f) * from, from);
    weight.weight = turned.data();
    weight.k = layer_.depth();
    weight.from_zero = true;
    layer_.out = weight.n;
    layer_.second = Weights(packed_bytes8(weight.k, weight.n));
    pack8(weight, layer_.second.data());
  }

  const InstructionSet& isa_;
  ConvolutionLayer layer_;
};

}  // namespace u2moe
