// Operators for mixtures of experts, and for feed-forward layers. A feed-forward layer is one expert for all tokens.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "parameters.h"

namespace u2moe {

class ExpertsOperator {
 public:
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.last() != layer_.dim) throw Invalid("input 0 must be [..., " + std::to_string(layer_.dim) + "]");
    auto* y = static_cast<float*>(call.output(0, x.shape));
    run_experts(isa_, layer_, x.as<float>(), x.rows(), y, CallThreads(call));
  }

 protected:
  ExpertsOperator() : isa_(isa()) {}

  void read_activation(const Node& node) {
    layer_.activation = activation_named(node.text("activation"));
    layer_.lowest = lowest_of(layer_.activation);
  }

  void read_router(Node& node) {
    layer_.experts = static_cast<size_t>(node.integer("num_experts", 1, kMostExperts));
    layer_.top_k = static_cast<size_t>(node.integer("top_k", 1, static_cast<int64_t>(layer_.experts)));
    std::vector<int64_t> shape;
    const auto* gate = node.constant<float>("gate", {-1, static_cast<int64_t>(layer_.experts)}, &shape);
    layer_.dim = static_cast<size_t>(shape[0]);
    const size_t width = rounded_up(layer_.experts, kPanel);
    layer_.router = Weights(layer_.dim * width * sizeof(float));
    auto* to = reinterpret_cast<float*>(layer_.router.data());
    for (size_t d = 0; d < layer_.dim; d++)
      for (size_t e = 0; e < width; e++) to[d * width + e] = e < layer_.experts ? gate[d * layer_.experts + e] : 0.0f;
  }

  // Reads weights that were packed in advance.
  void read_packed(Node& node, size_t group, bool is_gated = false) {
    layer_.hidden = size_of(node, "hidden");
    layer_.group = group;
    check_inner(std::max(layer_.dim, layer_.hidden));
    layer_.gate_bytes = is_gated ? packed_bytes(layer_.dim, layer_.hidden, group) : 0;
    layer_.first_bytes = packed_bytes(layer_.dim, layer_.hidden, group);
    layer_.second_bytes = packed_bytes(layer_.hidden, layer_.dim, group);
    layer_.weights = node.packed(layer_.expert_bytes() * layer_.experts);
    check_all_read(node);
  }

  // Packs the weights of all experts in turn. The order within an expert is gate (if there is one), first, second.
  void pack(const std::vector<Matrix>& matrices, bool is_gated = false) {
    layer_.hidden = matrices[0].n;
    layer_.group = matrices[0].group;
    layer_.gate_bytes = is_gated ? matrices[0].bytes() : 0;
    layer_.first_bytes = matrices[is_gated].bytes();
    layer_.second_bytes = matrices[is_gated + 1].bytes();
    layer_.weights = Weights(layer_.expert_bytes() * layer_.experts);
    uint8_t* to = layer_.weights.data();
    for (const Matrix& matrix : matrices) {
      matrix.pack(to);
      to += matrix.bytes();
    }
  }

  const InstructionSet& isa_;
  ExpertLayer layer_;
};

class Int8Experts : public ExpertsOperator {
 public:
  static constexpr const char* kName = names::kInt8MixtureOfExperts;
  explicit Int8Experts(Node& node) {
    const bool bias = node.integer("bias", 0, 1) != 0;
    read_activation(node);
    node.skip();
    read_router(node);
    if (is_packed(node)) {
      read_packed(node, 0);
      return;
    }
    const auto dim = static_cast<int64_t>(layer_.dim), experts = static_cast<int64_t>(layer_.experts);
    const float* second_bias = bias ? node.constant<float>("w2_bias", {experts, dim}) : nullptr;
    std::vector<Matrix> matrices;
    int64_t hidden = -1;
    for (size_t e = 0; e < layer_.experts; e++) {
      matrices.push_back(read_int8(node, dim, hidden, bias));
      hidden = static_cast<int64_t>(matrices.back().n);
      matrices.push_back(read_int8(node, hidden, dim, false));
      if (bias) matrices.back().eight.bias = second_bias + e * layer_.dim;
    }
    check_all_read(node);
    pack(matrices);
  }
};

class Int4Experts : public ExpertsOperator {
 public:
  static constexpr const char* kName = names::kInt4MixtureOfExperts;
  explicit Int4Experts(Node& node) {
    const bool bias = node.integer("bias", 0, 1) != 0;
    const size_t group = group_of(node);
    read_activation(node);
    node.skip();
    read_router(node);
    if (is_packed(node)) {
      read_packed(node, group);
      return;
    }
    const auto dim = static_cast<int64_t>(layer_.dim);
    std::vector<Matrix> matrices;
    int64_t hidden = -1;
    for (size_t e = 0; e < layer_.experts; e++) {
      matrices.push_back(read_int4(node, dim, hidden, group, bias));
      hidden = static_cast<int64_t>(matrices.back().n);
      matrices.push_back(read_int4(node, hidden, dim, group, bias));
    }
    check_all_read(node);
    pack(matrices);
  }
};

// One expert for all tokens.
template <bool kIsGated, bool kIsInt4>
class SingleExpert : public ExpertsOperator {
 public:
  static constexpr const char* kName =
      kIsInt4 ? (kIsGated ? names::kInt4GatedFeedForward : names::kInt4FeedForward)
              : (kIsGated ? names::kInt8GatedFeedForward : names::kInt8FeedForward);
  explicit SingleExpert(Node& node) {
    const bool bias = node.integer("bias", 0, 1) != 0;
    read_activation(node);
    if (kIsGated) layer_.lowest = 0.0f;  // the product of a gate and activations has no lowest value
    const size_t group = kIsInt4 ? group_of(node) : 0;
    node.skip();
    if (kIsInt4 || is_packed(node)) layer_.dim = size_of(node, "in");
    if (is_packed(node)) {
      read_packed(node, group, kIsGated);
      return;
    }
    std::vector<Matrix> matrices;
    int64_t dim = kIsInt4 ? static_cast<int64_t>(layer_.dim) : -1, hidden = -1;
    if (kIsGated) add(matrices, node, dim, hidden, group, false);
    add(matrices, node, dim, hidden, group, bias);
    add(matrices, node, hidden, dim, group, bias);
    check_all_read(node);
    layer_.dim = static_cast<size_t>(dim);
    pack(matrices, kIsGated);
  }

 private:
  // Reads and appends a weight matrix. Unknown sizes (-1) are set from it; known sizes must match.
  static void add(std::vector<Matrix>& matrices, Node& node, int64_t& k, int64_t& n, size_t group, bool bias) {
    matrices.push_back(group ? read_int4(node, k, n, group, bias) : read_int8(node, k, n, bias));
    k = static_cast<int64_t>(matrices.back().k);
    n = static_cast<int64_t>(matrices.back().n);
  }
};
using FeedForward = SingleExpert<false, false>;
using GatedFeedForward = SingleExpert<true, false>;
using Int4FeedForward = SingleExpert<false, true>;
using Int4GatedFeedForward = SingleExpert<true, true>;

}  // namespace u2moe
