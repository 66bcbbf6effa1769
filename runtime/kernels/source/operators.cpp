// The operators of domain "u2moe", and the two functions that the library exports. docs/kernels.md describes them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "layout.h"
#include "ort.h"

#if defined(_WIN32)
#define U2MOE_EXPORT extern "C" __declspec(dllexport)
#else
#define U2MOE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace u2moe {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
constexpr int64_t kMostElements = int64_t{1} << 31;
constexpr int64_t kMostSize = int64_t{1} << 24;  // of one axis of a weight
constexpr size_t kMostInner = size_t{1} << 16;   // rows of a weight in int8: 255 * 128 times that fits in 32 bits

const InstructionSet& isa() {
  const char* message;
  const InstructionSet* chosen = instruction_set(&message);
  if (chosen == nullptr) throw Invalid(message);
  return *chosen;
}

// ------------------------------------------------------------------------------------------------ attributes

Activation activation_named(const std::string& name) {
  static constexpr const char* kNames[] = {"relu", "swish", "gelu", "tanh", "hardtanh", "selu"};
  for (size_t i = 0; i < 6; i++)
    if (name == kNames[i]) return static_cast<Activation>(i);
  throw Invalid("attribute activation must be relu, swish, gelu, tanh, hardtanh or selu, got '" + name + "'");
}

// How far below zero the output of an activation can go; `quantize.arithmetic.LOWEST`.
float lowest_of(const std::string& name) {
  if (name == "swish") return 0.2785f;
  if (name == "gelu") return 0.17f;
  return 0.0f;
}

// ------------------------------------------------------------------------------------------------ weights

size_t packed_bytes(size_t k, size_t n, size_t group) {
  return group ? packed_bytes4(k, n, group) : packed_bytes8(k, n);
}

// One weight matrix as the graph has it.
struct Matrix {
  Int8Weight eight{};
  Int4Weight four{};
  size_t k = 0, n = 0, group = 0;

  size_t bytes() const { return packed_bytes(k, n, group); }
  void pack(uint8_t* to) const { group ? pack4(four, to) : pack8(eight, to); }
};

// Sums over `k` products must fit in 32 bits.
void check_inner(size_t k) {
  if (k > kMostInner)
    throw Invalid("a weight has " + std::to_string(k) + " rows, expected at most " + std::to_string(kMostInner));
}

// Reads weight, scale and bias; `k` and `n` are -1 if any size will do.
Matrix read_int8(Node& node, int64_t k, int64_t n, bool bias, float step) {
  std::vector<int64_t> shape;
  Matrix m;
  m.eight.weight = node.constant<int8_t>("weight", {k, n}, &shape);
  if (shape[0] > kMostElements / shape[1]) throw Invalid("a weight has too many elements");
  m.k = m.eight.k = static_cast<size_t>(shape[0]);
  check_inner(m.k);
  m.n = m.eight.n = static_cast<size_t>(shape[1]);
  m.eight.scale = node.constant<float>("scale", {shape[1]});
  m.eight.bias = bias ? node.constant<float>("bias", {shape[1]}) : nullptr;
  m.eight.step = step;
  return m;
}

Matrix read_int4(Node& node, int64_t k, int64_t n, int64_t group, bool bias) {
  std::vector<int64_t> shape;
  Matrix m;
  const int64_t groups = (k + group - 1) / group;
  m.four.weight = node.constant<uint8_t>("weight", {n, groups, group / 2}, &shape);
  if (shape[0] > kMostElements / (groups * group)) throw Invalid("a weight has too many elements");
  m.k = m.four.k = static_cast<size_t>(k);
  m.n = m.four.n = static_cast<size_t>(shape[0]);
  m.group = m.four.group = static_cast<size_t>(group);
  m.four.scale = node.constant<float>("scale", {shape[0] * groups});
  m.four.bias = bias ? node.constant<float>("bias", {shape[0]}) : nullptr;
  return m;
}

LinearLayer linear_of(const Matrix& matrix, float lowest) {
  LinearLayer layer;
  layer.k = matrix.k;
  layer.n = matrix.n;
  layer.lowest = lowest;
  layer.weights = Weights(matrix.bytes());
  matrix.pack(layer.weights.data());
  return layer;
}

// Whether weights were packed in advance, by `u2moe quantize --packed`.
bool is_packed(const Node& node) { return node.has("layout") && node.integer("layout", kLayout, kLayout); }

size_t size_of(const Node& node, const char* name) { return static_cast<size_t>(node.integer(name, 1, kMostSize)); }

LinearLayer read_linear(Node& node, bool bias, float lowest) {
  if (!is_packed(node)) return linear_of(read_int8(node, -1, -1, bias, kStep), lowest);
  LinearLayer layer;
  layer.k = size_of(node, "in");
  check_inner(layer.k);
  layer.n = size_of(node, "out");
  layer.lowest = lowest;
  layer.weights = node.packed(packed_bytes8(layer.k, layer.n));
  return layer;
}

void check_all_read(const Node& node) {
  if (node.num_constants() != node.num_inputs())
    throw Invalid("has " + std::to_string(node.num_inputs()) + " inputs, expected " +
                  std::to_string(node.num_constants()));
}

// ------------------------------------------------------------------------------------------------ operators
//
// Each is a class that is constructed when a session is, and computes when it runs.

class Rows {
 public:
  static constexpr const char* kName = "Int8Rows";
  static constexpr ONNXTensorElementDataType kOutputs[] = {kUint8, kFloat};
  explicit Rows(Node& node) : isa_(isa()), lowest_(lowest_of(node.text("activation"))) {
    node.skip();
    check_all_read(node);
  }
  void compute(const Call& call) const {
    const Tensor x = call.input(0, kFloat);
    if (x.last() == 0) throw Invalid("input 0 has rows without elements");
    std::vector<int64_t> shape = x.shape;
    auto* q = static_cast<uint8_t*>(call.output(0, shape));
    shape.back() = 1;
    auto* peak = static_cast<float*>(call.output(1, shape));
    run_rows(isa_, x.as<float>(), x.rows(), x.last(), lowest_, q, peak, CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  float lowest_;
};

class MatMul {
 public:
  static constexpr const char* kName = "Int8MatMul";
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit MatMul(Node& node) : isa_(isa()) {
    node.skip();
    node.skip();
    layer_ = read_linear(node, node.num_inputs() == 5, 0.0f);
    check_all_read(node);
  }
  void compute(const Call& call) const {
    const Tensor q = call.input(0, kUint8), peak = call.input(1, kFloat);
    std::vector<int64_t> shape = q.shape;
    shape.back() = 1;
    if (q.last() != layer_.k || peak.shape != shape)
      throw Invalid("inputs 0 and 1 must be [..., " + std::to_string(layer_.k) + "] and [..., 1]");
    shape.back() = static_cast<int64_t>(layer_.n);
    auto* y = static_cast<float*>(call.output(0, shape));
    run_matmul(isa_, layer_, q.as<uint8_t>(), peak.as<float>(), q.rows(), y, CallThreads(call));
  }

 private:
  const InstructionSet& isa_;
  LinearLayer layer_;
};

class Linear {
 public:
  static constexpr const char* kName = "Int8Linear";
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit Linear(Node& node) : isa_(isa()) {
    node.skip();
    const float lowest = lowest_of(node.text("activation"));
    layer_ = read_linear(node, node.num_inputs() == 4, lowest);
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
    const std::string name = node.text("activation");
    layer_.activation = activation_named(name);
    layer_.lowest = lowest_of(name);
  }

  void read_router(Node& node) {
    layer_.experts = static_cast<size_t>(node.integer("num_experts", 1, kMostExperts));
    layer_.top_k = static_cast<size_t>(node.integer("top_k", 1, static_cast<int64_t>(layer_.experts)));
    layer_.skip_below = layer_.top_k > 1 ? node.number("skip_below", 0, 1) : 0.0f;
    std::vector<int64_t> shape;
    const auto* gate = node.constant<float>("gate", {-1, static_cast<int64_t>(layer_.experts)}, &shape);
    layer_.dim = static_cast<size_t>(shape[0]);
    const size_t width = rounded_up(layer_.experts, kPanel);
    layer_.router = Weights(layer_.dim * width * sizeof(float));
    auto* to = reinterpret_cast<float*>(layer_.router.data());
    for (size_t d = 0; d < layer_.dim; d++)
      for (size_t e = 0; e < width; e++) to[d * width + e] = e < layer_.experts ? gate[d * layer_.experts + e] : 0.0f;
  }

  // All products, where they are packed already.
  void read_packed(Node& node, size_t group, bool is_gated = false) {
    layer_.hidden = size_of(node, "hidden");
    layer_.group = group;
    if (!group) check_inner(std::max(layer_.dim, layer_.hidden));
    layer_.gate_bytes = is_gated ? packed_bytes(layer_.dim, layer_.hidden, group) : 0;
    layer_.first_bytes = packed_bytes(layer_.dim, layer_.hidden, group);
    layer_.second_bytes = packed_bytes(layer_.hidden, layer_.dim, group);
    layer_.weights = node.packed(layer_.expert_bytes() * layer_.experts);
    check_all_read(node);
  }

  // The products of all experts, in turn: gate if there is one, first, second.
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
  static constexpr const char* kName = "Int8MixtureOfExperts";
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
      matrices.push_back(read_int8(node, dim, hidden, bias, 1.0f));
      hidden = static_cast<int64_t>(matrices.back().n);
      matrices.push_back(read_int8(node, hidden, dim, false, 1.0f));
      if (bias) matrices.back().eight.bias = second_bias + e * layer_.dim;
    }
    check_all_read(node);
    pack(matrices);
  }
};

class Int4Experts : public ExpertsOperator {
 public:
  static constexpr const char* kName = "Int4MixtureOfExperts";
  explicit Int4Experts(Node& node) {
    const bool bias = node.integer("bias", 0, 1) != 0;
    const int64_t group = node.integer("block_size", 16, 128);
    if ((group & (group - 1)) != 0) throw Invalid("attribute block_size must be 16, 32, 64 or 128");
    read_activation(node);
    node.skip();
    read_router(node);
    if (is_packed(node)) {
      read_packed(node, static_cast<size_t>(group));
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
template <bool kIsGated>
class SingleExpert : public ExpertsOperator {
 public:
  static constexpr const char* kName = kIsGated ? "Int8GatedFeedForward" : "Int8FeedForward";
  explicit SingleExpert(Node& node) {
    const bool bias = node.integer("bias", 0, 1) != 0;
    read_activation(node);
    if (kIsGated) layer_.lowest = 0.0f;  // products with the gate have no lowest value
    node.skip();
    layer_.by_peak = true;
    if (is_packed(node)) {
      layer_.dim = size_of(node, "in");
      read_packed(node, 0, kIsGated);
      return;
    }
    std::vector<Matrix> matrices;
    int64_t dim = -1, hidden = -1;
    if (kIsGated) add(matrices, node, dim, hidden, false);
    add(matrices, node, dim, hidden, bias);
    add(matrices, node, hidden, dim, bias);
    check_all_read(node);
    layer_.dim = static_cast<size_t>(dim);
    pack(matrices, kIsGated);
  }

 private:
  // The first matrix says the sizes of all.
  static void add(std::vector<Matrix>& matrices, Node& node, int64_t& k, int64_t& n, bool bias) {
    matrices.push_back(read_int8(node, k, n, bias, kStep));
    k = static_cast<int64_t>(matrices.back().k);
    n = static_cast<int64_t>(matrices.back().n);
  }
};
using FeedForward = SingleExpert<false>;
using GatedFeedForward = SingleExpert<true>;

// Both convolutions of the front end.
class FirstConvolutions {
 public:
  static constexpr const char* kName = "Int8FirstConvolutions";
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit FirstConvolutions(Node& node) : isa_(isa()) {
    layer_.bins = size_of(node, "bins");
    layer_.channels = size_of(node, "channels");
    node.pair("kernels", kMostKernel, layer_.kernels);
    node.pair("strides", kMostKernel, layer_.strides);
    if (layer_.bins < layer_.kernels[0] || layer_.inner() < layer_.kernels[1])
      throw Invalid("attribute bins is less than the kernels need");
    node.skip();
    const size_t given = layer_.channels;
    const auto taps = static_cast<int64_t>(layer_.taps()), channels = static_cast<int64_t>(given);
    const auto* first = node.constant<float>("first_weight", {taps, channels});
    Matrix second = read_int8(node, static_cast<int64_t>(layer_.depth()), -1, true, 1.0f);
    check_all_read(node);
    if (static_cast<int64_t>(layer_.bins) > kMostElements / (channels * taps)) throw Invalid("has too many elements");
    layer_.channels = rounded_up(given, 4);  // products take four at a time
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

  // The graph's rows are in the order (time, frequency, channels).
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

// Checks an input against the others; -1 stands for any size.
void check(const Tensor& tensor, size_t index, const std::vector<int64_t>& shape) {
  bool fits = tensor.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++) fits = shape[i] < 0 || tensor.shape[i] == shape[i];
  if (!fits) throw Invalid("input " + std::to_string(index) + " does not fit the others");
}

int64_t number(const Call& call, size_t index) {
  const Tensor tensor = call.input(index, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 0);
  if (tensor.size() != 1) throw Invalid("input " + std::to_string(index) + " must be one number");
  return *tensor.as<int64_t>();
}

// Of the first axis of a cache [blocks, ...], the part of one block; `index` is that of the cache, whose number follows it.
const float* block_of(const Call& call, const Tensor& cache, size_t index) {
  const int64_t block = number(call, index + 1);
  if (block < 0 || block >= cache.shape[0])
    throw Invalid("input " + std::to_string(index) + " has no block " + std::to_string(block));
  return cache.as<float>() + static_cast<size_t>(block) * (cache.size() / cache.axis(0));
}

// The product of queries, keys and values of a chunk of frames, with a cache of those before it.
class CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat, kFloat};
  explicit CachedAttention(Node& node)
      : isa_(isa()),
        heads_(size_of(node, "num_heads")),
        kv_heads_(size_of(node, "num_kv_heads")),
        size_(size_of(node, "size")) {
    if (heads_ % kv_heads_ != 0) throw Invalid("attribute num_heads must be a multiple of num_kv_heads");
    is_relative_ = node.integer("relative", 0, 1) != 0;
    for (int i = 0; i < 6 + is_relative_; i++) node.skip();
    check_all_read(node);
  }

  void compute(const Call& call) const {
    const Tensor query = call.input(0, kFloat), key_value = call.input(1, kFloat), cache = call.input(2, kFloat);
    check(query, 0, {-1, -1, static_cast<int64_t>(heads_ * size_)});
    Attention a{};
    a.batch = query.axis(0);
    a.time = query.axis(1);
    a.heads = heads_;
    a.kv_heads = kv_heads_;
    a.size = size_;
    check(key_value, 1, {query.shape[0], query.shape[1], static_cast<int64_t>(2 * a.size * kv_heads_)});
    a.num_past = cache.shape.size() == 5 ? cache.axis(3) : 0;
    const auto width = static_cast<int64_t>(2 * a.size);
    check(cache, 2, {-1, query.shape[0], static_cast<int64_t>(kv_heads_), static_cast<int64_t>(a.num_past), width});
    a.query = query.as<float>();
    a.key_value = key_value.as<float>();
    a.past = block_of(call, cache, 2);
    read_biases(call, a);
    a.out = static_cast<float*>(call.output(0, query.shape));
    run_attention(isa_, a, CallThreads(call));
    keep(call, a);
  }

 private:
  void read_biases(const Call& call, Attention& a) const {
    const Tensor bias = call.input(5, kFloat);
    const size_t sizes[] = {a.batch, a.heads, a.time, a.num_past + a.time};
    bool fits = bias.shape.size() == 4 && bias.axis(3) == sizes[3];
    for (size_t i = 0; fits && i < 3; i++) fits = bias.axis(i) == sizes[i] || bias.axis(i) == 1;
    if (!fits) throw Invalid("input 5 does not fit the others");
    a.bias = bias.as<float>();
    a.bias_time_stride = bias.axis(2) > 1 ? sizes[3] : 0;
    a.bias_head_stride = bias.axis(1) > 1 ? bias.axis(2) * sizes[3] : 0;
    a.bias_batch_stride = bias.axis(0) > 1 ? bias.axis(1) * bias.axis(2) * sizes[3] : 0;
    if (!is_relative_) return;
    const Tensor positions = call.input(6, kFloat);
    const auto width = static_cast<int64_t>(a.heads * a.size);
    check(positions, 6, {-1, static_cast<int64_t>(sizes[3]), width});
    if (positions.axis(0) != 1 && positions.axis(0) != a.batch) throw Invalid("input 6 does not fit the others");
    a.positions = positions.as<float>();
    a.positions_batch_stride = positions.axis(0) > 1 ? sizes[3] * a.heads * a.size : 0;
  }

  // The keys and values of this call from frame `first` on, as they are cached [1, batch, kv_heads, time, 2 * size].
  void keep(const Call& call, const Attention& a) const {
    const auto time = static_cast<int64_t>(a.time);
    int64_t first = number(call, 4);
    if (first < 0) first += time;
    first = first < 0 ? 0 : first > time ? time : first;
    const size_t width = 2 * a.size, kept = static_cast<size_t>(time - first);
    auto* to = static_cast<float*>(call.output(1, {1, static_cast<int64_t>(a.batch), static_cast<int64_t>(kv_heads_),
                                                   static_cast<int64_t>(kept), static_cast<int64_t>(width)}));
    if (kept == 0) return;  // the batch may be of any size then
    for (size_t row = 0; row < a.batch * kv_heads_; row++) {
      const size_t batch = row / kv_heads_, head = row % kv_heads_;
      for (size_t t = a.time - kept; t < a.time; t++, to += width)
        std::memcpy(to, a.key_value + ((batch * a.time + t) * kv_heads_ + head) * width, width * sizeof(float));
    }
  }

  const InstructionSet& isa_;
  size_t heads_, kv_heads_, size_;
  bool is_relative_ = false;
};

// What stands between the projections of a streamed block's convolution module, with a cache of the frames before.
class CachedConvolution {
 public:
  static constexpr const char* kName = "CachedConvolution";
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

  // Taps in front of channels; without a bias it is 0.
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

// Layer normalisation over the last axis, of x or of the sum of x and a branch, which is then an output, too.
template <bool kIsSum>
class Normalizing {
 public:
  static constexpr const char* kName = kIsSum ? "AddNormalization" : "Normalization";
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

// ------------------------------------------------------------------------------------------------ registration

// One operator under one name. The first input and all after it are of any type here: what they must be is checked when
// the kernel is created, with a message.
template <class Op>
struct Registered : OrtCustomOp {
  std::string name;

  void fill(const std::string& with_number) {
    name = with_number;
    static_cast<OrtCustomOp&>(*this) = OrtCustomOp{};
    version = kApiVersion;
    GetName = [](const OrtCustomOp* self) { return static_cast<const Registered*>(self)->name.c_str(); };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetInputType = [](const OrtCustomOp*, size_t) { return kAny; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return sizeof Op::kOutputs / sizeof kFloat; };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Op::kOutputs[index]; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatusPtr {
      return guarded(Op::kName, [&] {
        Node node(info);
        *kernel = new Op(node);
        node.give_back();
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
      return guarded(Op::kName, [&] { static_cast<const Op*>(kernel)->compute(Call(context)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  }
};

constexpr size_t kNumbers = 9;

template <class Op>
void add(OrtCustomOpDomain* domain) {
  static Registered<Op> registered[kNumbers];  // they live as long as the library
  static const bool is_filled = [] {
    for (size_t i = 0; i < kNumbers; i++)
      registered[i].fill(i ? std::string(Op::kName) + "_" + std::to_string(i + 1) : Op::kName);
    return true;
  }();
  (void)is_filled;
  for (Registered<Op>& op : registered) Api::check(Api::get().CustomOpDomain_Add(domain, &op));
}

// Where activations cannot be as large, the function stays with onnxruntime.
template <class Op>
constexpr bool kNeeds255 = std::is_same_v<Op, FirstConvolutions>;

template <class... Ops>
struct List {
  static void add_to(OrtCustomOpDomain* domain, const InstructionSet& isa) {
    ((isa.holds_255 || !kNeeds255<Ops> ? add<Ops>(domain) : void()), ...);
  }
  static std::string names(const InstructionSet& isa) {
    std::string text;
    ((text += isa.holds_255 || !kNeeds255<Ops> ? (text.empty() ? "\"" : ", \"") + std::string(Ops::kName) + "\"" : ""),
     ...);
    return text;
  }
};
using Operators = List<Int8Experts, Int4Experts, Rows, MatMul, Linear, FeedForward, GatedFeedForward, FirstConvolutions,
                       CachedAttention, CachedConvolution, PlainNormalization, AddNormalization>;

std::string description() {
  const char* message;
  const InstructionSet* chosen = instruction_set(&message);
  if (chosen == nullptr) return std::string("{\"error\": \"") + message + "\"}";
  const InstructionSet* sets[8];
  std::string names;
  for (size_t i = 0, count = available(sets); i < count; i++)
    names += (i ? ", \"" : "\"") + std::string(sets[i]->name) + "\"";
  return std::string("{\"contract\": 1, \"isa\": \"") + chosen->name + "\", \"isas\": [" + names + "], \"api\": " +
         std::to_string(kApiVersion) + ", \"layout\": " + std::to_string(kLayout) +
         ", \"domain\": \"u2moe\", \"operators\": [" + Operators::names(*chosen) + "]}";
}

}  // namespace
}  // namespace u2moe

// Called by onnxruntime's `RegisterCustomOpsLibrary`.
U2MOE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(u2moe::kApiVersion);
  if (api == nullptr) return nullptr;  // older than the API: without an API there is no way to report it
  u2moe::Api::set(api);
  return u2moe::guarded("u2moe-kernels", [&] {
    u2moe::isa();
    // made once, by the first of several threads; if that fails, the next call tries again
    static OrtCustomOpDomain* const domain = [&] {
      OrtCustomOpDomain* made = nullptr;
      u2moe::Api::check(api->CreateCustomOpDomain("u2moe", &made));
      u2moe::Operators::add_to(made, u2moe::isa());
      return made;
    }();
    u2moe::Api::check(api->AddCustomOpDomain(options, domain));
  });
}

// What this library is, as JSON; written to `text` if `size` is enough. Returns the bytes needed, with a final zero.
U2MOE_EXPORT size_t u2moe_kernels_describe(char* text, size_t size) {
  try {
    const std::string found = u2moe::description();
    if (found.size() < size) std::memcpy(text, found.c_str(), found.size() + 1);
    return found.size() + 1;
  } catch (...) {
    return 0;
  }
}

// Packs a weight [k, n] for the operators; with `to` null, only returns the bytes that it takes. The scales are multiplied
// by `step`; `bias` may be null.
U2MOE_EXPORT size_t u2moe_kernels_pack_int8(const int8_t* weight, const float* scale, const float* bias, size_t k,
                                            size_t n, float step, uint8_t* to) {
  if (to != nullptr) u2moe::pack8({weight, scale, bias, k, n, step}, to);
  return u2moe::packed_bytes8(k, n);
}

// The same for 4 bits, of a weight [n, groups, group / 2] as MatMulNBits reads it.
U2MOE_EXPORT size_t u2moe_kernels_pack_int4(const uint8_t* weight, const float* scale, const float* bias, size_t k,
                                            size_t n, size_t group, uint8_t* to) {
  if (to != nullptr) u2moe::pack4({weight, scale, bias, k, n, group}, to);
  return u2moe::packed_bytes4(k, n, group);
}
