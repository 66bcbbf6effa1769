#include "parameters.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

namespace u2moe {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 24;  // maximum size of an axis of a weight
constexpr size_t kMostInner = size_t{1} << 16;   // maximum rows of an int8 weight: 255 * 128 * this fits in 32 bits

}  // namespace

const InstructionSet& isa() {
  const char* message;
  const InstructionSet* chosen = instruction_set(&message);
  if (chosen == nullptr) throw Invalid(message);
  return *chosen;
}

Activation activation_named(const std::string& name) {
  for (size_t i = 0; i < std::size(kActivations); i++)
    if (name == kActivations[i].name) return static_cast<Activation>(i);
  throw Invalid(std::string("attribute activation must be ") + kActivationNames + ", got '" + name + "'");
}

float lowest_of(Activation activation) { return kActivations[static_cast<size_t>(activation)].lowest; }

float lowest_of_rows(const std::string& name) { return name.empty() ? 0.0f : lowest_of(activation_named(name)); }

void check_inner(size_t k) {
  if (k > kMostInner)
    throw Invalid("a weight has " + std::to_string(k) + " rows, expected at most " + std::to_string(kMostInner));
}

size_t size_of(const Node& node, const char* name) { return static_cast<size_t>(node.integer(name, 1, kMostSize)); }

size_t packed_bytes(size_t k, size_t n, size_t group) {
  return group ? packed_bytes4(k, n, group) : packed_bytes8(k, n);
}

Matrix read_int8(Node& node, int64_t k, int64_t n, bool bias) {
  std::vector<int64_t> shape;
  Matrix m;
  m.eight.weight = node.constant<int8_t>("weight", {k, n}, &shape);
  if (shape[0] > kMostElements / shape[1]) throw Invalid("a weight has too many elements");
  m.k = m.eight.k = static_cast<size_t>(shape[0]);
  check_inner(m.k);
  m.n = m.eight.n = static_cast<size_t>(shape[1]);
  m.eight.scale = node.constant<float>("scale", {shape[1]});
  m.eight.bias = bias ? node.constant<float>("bias", {shape[1]}) : nullptr;
  return m;
}

size_t group_of(const Node& node) {
  const int64_t group = node.integer("block_size", 16, 128);
  if ((group & (group - 1)) != 0) throw Invalid("attribute block_size must be 16, 32, 64 or 128");
  return static_cast<size_t>(group);
}

Matrix read_int4(Node& node, int64_t k, int64_t n, size_t size, bool bias) {
  std::vector<int64_t> shape;
  Matrix m;
  const auto group = static_cast<int64_t>(size), groups = (k + group - 1) / group;
  m.four.weight = node.constant<uint8_t>("weight", {n, groups, group / 2}, &shape);
  check_inner(static_cast<size_t>(k));
  if (shape[0] > kMostElements / (groups * group)) throw Invalid("a weight has too many elements");
  m.k = m.four.k = static_cast<size_t>(k);
  m.n = m.four.n = static_cast<size_t>(shape[0]);
  m.group = m.four.group = size;
  m.four.step = node.constant<uint8_t>("steps", {shape[0], groups});
  const bool fit = std::all_of(m.four.step, m.four.step + shape[0] * groups, step_fits);
  if (!fit) throw Invalid("a step makes weights exceed 8 bits");
  m.four.scale = node.constant<float>("scale", {shape[0]});
  m.four.bias = bias ? node.constant<float>("bias", {shape[0]}) : nullptr;
  return m;
}

namespace {

LinearLayer linear_of(const Matrix& matrix, float lowest) {
  LinearLayer layer;
  layer.k = matrix.k;
  layer.n = matrix.n;
  layer.group = matrix.group;
  layer.lowest = lowest;
  layer.weights = Weights(matrix.bytes());
  matrix.pack(layer.weights.data());
  return layer;
}

}  // namespace

bool is_packed(const Node& node) { return node.has("layout") && node.integer("layout", kLayout, kLayout); }

LinearLayer read_linear(Node& node, bool bias, float lowest, size_t group) {
  if (!is_packed(node))
    return linear_of(group ? read_int4(node, node.integer("in", 1, kMostSize), -1, group, bias)
                           : read_int8(node, -1, -1, bias), lowest);
  LinearLayer layer;
  layer.k = size_of(node, "in");
  check_inner(layer.k);
  layer.n = size_of(node, "out");
  layer.group = group;
  layer.lowest = lowest;
  layer.weights = node.packed(packed_bytes(layer.k, layer.n, group));
  return layer;
}

void check_all_read(const Node& node) {
  if (node.num_read() != node.num_inputs())
    throw Invalid("has " + std::to_string(node.num_inputs()) + " inputs, expected " +
                  std::to_string(node.num_read()));
}

}  // namespace u2moe
