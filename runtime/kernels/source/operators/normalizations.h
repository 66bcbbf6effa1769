// Operators for layer normalisation.
#pragma once
#include <string>
#include <vector>

#include "inputs.h"
#include "parameters.h"

namespace u2moe {

// Layer normalisation over the last axis of x, or of the sum of x and a branch. This sum is then also an output.
template <bool kIsSum>
class Normalizing {
 public:
  static constexpr const char* kName = kIsSum ? names::kAddNormalization : names::kNormalization;
  explicit Normalizing(Node& node) : isa_(isa()), epsilon_(node.number("epsilon", 0, 1)) {
    for (int i = 0; i < 1 + kIsSum; i++) node.skip();
    std::vector<int64_t> shape;
    const auto* weight = node.constant<float>("weight", {-1}, &shape);
    const auto* bias = node.constant<float>("bias", {shape[0]});
    check_all_read(node);
    weight_.assign(weight, weight + shape[0]);
    bias_.assign(bias, bias + shape[0]);
  }

  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.last() != weight_.size()) throw Invalid("input 0 must be [..., " + std::to_string(weight_.size()) + "]");
    Normalization n{};
    n.x = x.as<float>();
    if (kIsSum) {
      const Tensor branch = call.input(1, kFloat);
      check(branch, 1, x.shape);
      n.branch = branch.as<float>();
      n.sum = static_cast<float*>(call.output(0, x.shape));
    }
    n.weight = weight_.data();
    n.bias = bias_.data();
    n.size = x.last();
    n.epsilon = epsilon_;
    n.out = static_cast<float*>(call.output(kIsSum, x.shape));
    run_normalization(isa_, n, x.rows(), CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  float epsilon_;
  std::vector<float> weight_, bias_;
};
class AddNormalization : public Normalizing<true> {
 public:
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat, kFloat};
  using Normalizing::Normalizing;
};
class PlainNormalization : public Normalizing<false> {
 public:
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  using Normalizing::Normalizing;
};

}  // namespace u2moe
