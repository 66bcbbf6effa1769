// Operators that attend to a cache of earlier frames, and assemble the cache for the next chunk.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "inputs.h"
#include "parameters.h"

namespace u2moe {

class CachedAttention {
 public:
  static constexpr const char* kName = names::kCachedAttention;
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
    if (!fits) throw Invalid("input 5 does not match the other inputs");
    a.bias = bias.as<float>();
    a.bias_time_stride = bias.axis(2) > 1 ? sizes[3] : 0;
    a.bias_head_stride = bias.axis(1) > 1 ? bias.axis(2) * sizes[3] : 0;
    a.bias_batch_stride = bias.axis(0) > 1 ? bias.axis(1) * bias.axis(2) * sizes[3] : 0;
    if (!is_relative_) return;
    const Tensor positions = call.input(6, kFloat);
    const auto width = static_cast<int64_t>(a.heads * a.size);
    check(positions, 6, {-1, static_cast<int64_t>(sizes[3]), width});
    if (positions.axis(0) != 1 && positions.axis(0) != a.batch) throw Invalid("input 6 does not match the other inputs");
    a.positions = positions.as<float>();
    a.positions_batch_stride = positions.axis(0) > 1 ? sizes[3] * a.heads * a.size : 0;
  }

  // Outputs the keys and values of this call as a cache [1, batch, kv_heads, time, 2 * size]. An input specifies the
  // first frame to keep.
  void keep(const Call& call, const Attention& a) const {
    const auto time = static_cast<int64_t>(a.time);
    int64_t first = number(call, 4);
    if (first < 0) first += time;
    first = first < 0 ? 0 : first > time ? time : first;
    const size_t width = 2 * a.size, kept = static_cast<size_t>(time - first);
    auto* to = static_cast<float*>(call.output(1, {1, static_cast<int64_t>(a.batch), static_cast<int64_t>(kv_heads_),
                                                   static_cast<int64_t>(kept), static_cast<int64_t>(width)}));
    if (kept == 0) return;  // the output is empty, and the batch may have any size
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

// Assembles the cache of the next chunk: for each block, the last frames of the old cache and the kept frames of this
// chunk. Every number is read and written once.
class NextCache {
 public:
  static constexpr const char* kName = names::kNextCache;
  static constexpr ONNXTensorElementDataType kOutputs[] = {kFloat};
  explicit NextCache(Node& node) : blocks_(node.num_inputs() - 2) {
    if (node.num_inputs() < 3) throw Invalid("there must be at least 3 inputs");
    while (node.num_read() < node.num_inputs()) node.skip();
  }

  void compute(const Call& call) const {
    const Tensor cache = call.input(0, kFloat);
    check(cache, 0, {static_cast<int64_t>(blocks_), -1, -1, -1, -1});
    std::vector<Tensor> kept;
    std::vector<int64_t> own = cache.shape, shape = cache.shape;
    own[0] = 1;
    own[3] = -1;
    for (size_t block = 0; block < blocks_; block++) {
      kept.push_back(call.input(2 + block, kFloat));
      check(kept.back(), 2 + block, own);
      own[3] = kept[0].shape[3];
    }
    const int64_t start = number(call, 1), past = cache.shape[3];
    const int64_t first = std::clamp<int64_t>(start < 0 ? start + past : start, 0, past);
    shape[3] = past - first + own[3];
    auto* out = static_cast<float*>(call.output(0, shape));
    const size_t rows = cache.axis(1) * cache.axis(2), width = cache.axis(4), stride = cache.axis(3) * width;
    const size_t skipped = static_cast<size_t>(first) * width, fresh = kept[0].axis(3) * width;
    const size_t length = stride - skipped + fresh;
    if (length == 0) return;  // the output is empty, and the batch may have any size
    CallThreads(call).each(blocks_, [&](size_t block) {
      float* to = out + block * rows * length;
      for (size_t row = 0; row < rows; row++) {
        const float* from = cache.as<float>() + (block * rows + row) * stride;
        to = std::copy(from + skipped, from + stride, to);
        to = std::copy_n(kept[block].as<float>() + row * fresh, fresh, to);
      }
    });
  }

 private:
  size_t blocks_;
};

}  // namespace u2moe
