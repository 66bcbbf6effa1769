#include "layout.h"

#include <cstring>

namespace u2moe {
namespace {

// Writes one block: `count` numbers, then zeros. Returns the end of the block.
template <class T>
uint8_t* append(uint8_t* to, const T* from, size_t count) {
  T padded[kBlock] = {};
  if (from != nullptr && count > 0) std::memcpy(padded, from, count * sizeof(T));
  std::memcpy(to, padded, sizeof padded);
  return to + sizeof padded;
}

// Returns whether the products of rows 2i and 2i + 1 can be added in 16 bits, for all i and activations up to 255. They
// can if the two weights in every column add up to a number from -128 to 128.
bool pairs_fit(const Int8Weight& from, size_t first, size_t columns) {
  constexpr int kMost = 128;
  for (size_t k = 0; k + 1 < from.k; k += 2) {
    const int8_t* row = from.weight + k * from.n + first;
    for (size_t c = 0; c < columns; c++) {
      const int sum = row[c] + row[from.n + c];
      if (sum > kMost || sum < -kMost) return false;
    }
  }
  return true;
}

size_t columns_of(size_t first, size_t n) { return n - first < kBlock ? n - first : kBlock; }

}  // namespace

void pack8(const Int8Weight& from, uint8_t* to) {
  const size_t depth = depth8(from.k);
  for (size_t first = 0; first < from.n; first += kBlock) {
    const size_t columns = columns_of(first, from.n);
    int32_t sums[kBlock] = {};
    std::memset(to, 0, depth * kBlock);
    for (size_t k = 0; k < from.k; k++) {
      const int8_t* row = from.weight + k * from.n + first;
      uint8_t* step = to + k / 4 * 4 * kBlock + k % 4;
      for (size_t c = 0; c < columns; c++) {
        step[c * 4] = static_cast<uint8_t>(row[c]);
        if (!from.from_zero) sums[c] -= 128 * row[c];
      }
    }
    to = append(to + depth * kBlock, from.scale + first, columns);
    to = append(to, sums, kBlock);
    to = append(to, from.bias ? from.bias + first : nullptr, columns);
    std::memset(to, 0, kLine);
    to[0] = pairs_fit(from, first, columns);
    to += kLine;
  }
}

void pack4(const Int4Weight& from, uint8_t* to) {
  const size_t groups = groups4(from.k, from.group), depth = groups * from.group;
  for (size_t first = 0; first < from.n; first += kBlock) {
    const size_t columns = columns_of(first, from.n);
    int32_t sums[kBlock] = {};
    uint8_t* bytes = to + step_bytes4(from.k, from.group);
    std::memset(to, 0, block_bytes4(from.k, from.group));
    for (size_t c = 0; c < columns; c++) {
      for (size_t k = 0; k < depth; k++) {
        const size_t at = (first + c) * depth + k, g = k / from.group;
        const uint8_t step = from.step[(first + c) * groups + g], zero = step >> 4, both = from.weight[at / 2];
        to[g * kBlock + c] = step;
        // padding rows have zero weights
        const int value = k >= from.k ? zero : k % 2 ? both >> 4 : both & 15;
        uint8_t& byte = bytes[(k / 8 * kBlock + c) * 4 + k % 4];
        byte = static_cast<uint8_t>(byte | (k % 8 < 4 ? value : value << 4));
        sums[c] -= 128 * (value - zero) * (step & 15);
      }
    }
    to = append(bytes + depth / 2 * kBlock, from.scale + first, columns);
    to = append(to, sums, kBlock);
    to = append(to, from.bias ? from.bias + first : nullptr, columns);
  }
}

}  // namespace u2moe
