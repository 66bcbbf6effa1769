// Operators that round rows to integers or multiply rows by one weight matrix.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "parameters.h"

namespace u2moe {

class Rows {
 public:
  static constexpr const char* kName = names::kInt8Rows;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kUint8, kFloat};
  explicit Rows(Node& node) : isa_(isa()), lowest_(lowest_of_rows(node.text("activation"))) {
    node.skip();
    check_all_read(node);
  }
  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.last() == 0) throw Invalid("input 0 has rows without elements");
    std::vector<int64_t> shape = x.shape;
    auto* q = static_cast<uint8_t*>(call.output(0, shape));
    shape.back() = 1;
    auto* scale = static_cast<float*>(call.output(1, shape));
    run_rows(isa_, x.as<float>(), x.rows(), x.last(), lowest_, q, scale, CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  float lowest_;
};

class MatMul {
 public:
  static constexpr const char* kName = names::kInt8MatMul;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit MatMul(Node& node) : isa_(isa()) {
    node.skip();
    node.skip();
    layer_ = read_linear(node, node.num_inputs() == 5, 0.0f);
    check_all_read(node);
    if (node.name().find("/linear_pos/") != std::string::npos) positions_ = std::make_unique<SeenRows>(layer_.k, layer_.n);
  }
  void compute(const Call& call) const {
    const Tensor q = call.input(0, kUint8), scale = call.input(1, kFloat);
    std::vector<int64_t> shape = q.shape;
    shape.back() = 1;
    if (q.last() != layer_.k || scale.shape != shape)
      throw Invalid("inputs 0 and 1 must be [..., " + std::to_string(layer_.k) + "] and [..., 1]");
    shape.back() = static_cast<int64_t>(layer_.n);
    auto* y = static_cast<float*>(call.output(0, shape));
    run_matmul(isa_, layer_, positions_.get(), q.as<uint8_t>(), scale.as<float>(), q.rows(), y, CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  LinearLayer layer_;
  std::unique_ptr<SeenRows> positions_;  // only for layers that project positions, which are recognised by name
};

template <bool kIsInt4>
class LinearOperator {
 public:
  static constexpr const char* kName = kIsInt4 ? names::kInt4Linear : names::kInt8Linear;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit LinearOperator(Node& node) : isa_(isa()) {
    node.skip();
    const float lowest = kIsInt4 ? 0.0f : lowest_of_rows(node.text("activation"));
    layer_ = read_linear(node, node.num_inputs() == 4 + kIsInt4, lowest, kIsInt4 ? group_of(node) : 0);
    check_all_read(node);
  }
  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.last() != layer_.k) throw Invalid("input 0 must be [..., " + std::to_string(layer_.k) + "]");
    std::vector<int64_t> shape = x.shape;
    shape.back() = static_cast<int64_t>(layer_.n);
    auto* y = static_cast<float*>(call.output(0, shape));
    run_linear(isa_, layer_, x.as<float>(), x.rows(), y, CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  LinearLayer layer_;
};
using Linear = LinearOperator<false>;
using Int4Linear = LinearOperator<true>;

}  // namespace u2moe
