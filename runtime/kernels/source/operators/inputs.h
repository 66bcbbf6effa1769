// Checks of input shapes, and access to the cache of one block.
#pragma once
#include <string>
#include <vector>

#include "../ort.h"

namespace u2moe {

// Checks the shape of an input; -1 stands for any size.
inline void check(const Tensor& tensor, size_t index, const std::vector<int64_t>& shape) {
  bool fits = tensor.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++) fits = shape[i] < 0 || tensor.shape[i] == shape[i];
  if (!fits) throw Invalid("input " + std::to_string(index) + " does not match the other inputs");
}

inline int64_t number(const Call& call, size_t index) {
  const Tensor tensor = call.input(index, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 0);
  if (tensor.size() != 1) throw Invalid("input " + std::to_string(index) + " must be one number");
  return *tensor.as<int64_t>();
}

// Returns one block of a cache [blocks, ...]. The cache is the input at `index`; the next input selects the
// block.
inline const float* block_of(const Call& call, const Tensor& cache, size_t index) {
  const int64_t block = number(call, index + 1);
  if (block < 0 || block >= cache.shape[0])
    throw Invalid("input " + std::to_string(index) + " has no block " + std::to_string(block));
  return cache.as<float>() + static_cast<size_t>(block) * (cache.size() / cache.axis(0));
}

}  // namespace u2moe
