// Layout of packed weights in memory; see the picture in docs/how/kernels.md.
//
// Columns (outputs) are in blocks of 32. A block consists of two panels of 16 columns. It has everything that its columns
// need, in the order in which it is read. All instruction sets use the same layout.
//
// int8: for every 4 rows: 2 panels x 16 columns x 4 rows int8 | scale float[32] | correction int32[32] | bias float[32]
//   | pairs uint32, and zeros to the end of the cache line
//   The correction is -128 times the sum of a column's weights, for instruction sets that add 128 to activations. `pairs`
//   is 1 if sums of products of rows 2i and 2i + 1 fit in 16 bits for all activations. AVX2 can then use vpmaddubsw.
// int4: for every group of rows: step uint8[32], and zeros to the end of the line | for every 8 rows: 2 panels x 16 columns
//   x 4 bytes, each with row i in the low half and row i + 4 in the high half | scale, correction and bias as in int8
//   The low half of a step is the factor of the group, and the high half is its zero point. A 4-bit weight w counts as
//   the int8 weight (w - high) * low.
#pragma once
#include <cstddef>
#include <cstdint>

namespace u2moe {

constexpr size_t kPanel = 16;
constexpr size_t kBlock = 32;
constexpr size_t kLine = 64;  // bytes of a cache line
constexpr size_t kUnpacked = 2;  // int4 blocks unpacked at once

static constexpr size_t rounded_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static constexpr size_t blocks_of(size_t columns) { return (columns + kBlock - 1) / kBlock; }

// int8. The depth is the number of rows in a block: k rounded up to a multiple of 64, since AMX reads 64 rows at once.
static constexpr size_t depth8(size_t k) { return rounded_up(k, 64); }
static constexpr size_t block_bytes8(size_t k) { return (depth8(k) + 12) * kBlock + kLine; }
static constexpr size_t packed_bytes8(size_t k, size_t n) { return blocks_of(n) * block_bytes8(k); }

// Returns `pairs`, one of a block's constants: whether the products of rows 2i and 2i + 1 can be added in 16 bits.
static inline bool pairs_fit8(const uint8_t* constants) { return constants[12 * kBlock] != 0; }

// int4
static constexpr size_t groups4(size_t k, size_t group) { return (k + group - 1) / group; }

static constexpr size_t step_bytes4(size_t k, size_t group) { return rounded_up(groups4(k, group) * kBlock, kLine); }
static constexpr size_t block_bytes4(size_t k, size_t group) {
  return step_bytes4(k, group) + (groups4(k, group) * group / 2 + 12) * kBlock;
}
static constexpr size_t packed_bytes4(size_t k, size_t n, size_t group) { return blocks_of(n) * block_bytes4(k, group); }

struct Int8Weight {
  const int8_t* weight;  // [k, n]
  const float* scale;    // [n]
  const float* bias;     // [n] or null
  size_t k, n;
  bool from_zero = false;  // activations are uint8 from 0, not around 128, and need no correction
};
void pack8(const Int8Weight& from, uint8_t* to);

struct Int4Weight {
  const uint8_t* weight;  // [n, groups, group / 2], with even rows in the low halves
  const uint8_t* step;    // [n, groups]
  const float* scale;     // [n]
  const float* bias;      // [n] or null
  size_t k, n, group;
};
void pack4(const Int4Weight& from, uint8_t* to);
// Returns whether (w - zero point) * factor fits in 8 bits for every 4-bit weight w of a group with this step.
static inline bool step_fits(uint8_t step) {
  const int zero = step >> 4, most = zero > 15 - zero ? zero : 15 - zero;
  return (step & 15) * most <= 127;
}

}  // namespace u2moe
