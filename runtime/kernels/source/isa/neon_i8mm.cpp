// NEON with i8mm, whose instruction multiplies two rows by two columns. Everything else is the same as with the dot
// product instruction.
#include "../loops.h"
#include "../vectors/neon.h"

namespace u2moe {
namespace {

// Multiplies `R` pairs of rows by one panel. The packed layout stores 4 weights of a column together. The instruction
// needs 8, so two such groups are interleaved. An odd last row is paired with itself.
template <int R>
void tile_of_pairs(const int8_t* codes, size_t stride, size_t rows, const uint8_t* weights, size_t steps,
                   const float* scale, float* unit) {
  int32x4_t sum[R][8];
  const int8_t* row[2 * R];
  U2MOE_UNROLL for (int m = 0; m < 2 * R; m++) {
    const size_t own = static_cast<size_t>(m) < rows ? static_cast<size_t>(m) : rows - 1;
    row[m] = codes + own * stride;
  }
  U2MOE_UNROLL for (int r = 0; r < R; r++) {
    U2MOE_UNROLL for (int c = 0; c < 8; c++) sum[r][c] = vdupq_n_s32(0);
  }
  for (size_t s = 0; s < steps; s++) {
    int8x16_t a[R];
    U2MOE_UNROLL for (int r = 0; r < R; r++)
      a[r] = vcombine_s8(vld1_s8(row[2 * r] + 8 * s), vld1_s8(row[2 * r + 1] + 8 * s));
    const uint8_t* next = weights + kBlock * 4;
    U2MOE_UNROLL for (int c = 0; c < 4; c++) {
      U2MOE_PREFETCH(weights + kNear, 3);
      const int32x4_t first = vreinterpretq_s32_u8(vld1q_u8(weights + 16 * c));
      const int32x4_t second = vreinterpretq_s32_u8(vld1q_u8(next + 16 * c));
      const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(first, second));
      const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      U2MOE_UNROLL for (int r = 0; r < R; r++) {
        sum[r][2 * c] = vmmlaq_s32(sum[r][2 * c], a[r], left);
        sum[r][2 * c + 1] = vmmlaq_s32(sum[r][2 * c + 1], a[r], right);
      }
    }
    weights += kBlock * 8;
  }
  U2MOE_UNROLL for (int c = 0; c < 4; c++) {
    const float32x4_t s = vld1q_f32(scale + 4 * c);
    U2MOE_UNROLL for (int r = 0; r < R; r++) {
      const int64x2_t l = vreinterpretq_s64_s32(sum[r][2 * c]), h = vreinterpretq_s64_s32(sum[r][2 * c + 1]);
      const int32x4_t upper = vreinterpretq_s32_s64(vzip1q_s64(l, h)), lower = vreinterpretq_s32_s64(vzip2q_s64(l, h));
      vst1q_f32(unit + 2 * r * kBlock + 4 * c, vmulq_f32(vcvtq_f32_s32(upper), s));
      vst1q_f32(unit + (2 * r + 1) * kBlock + 4 * c, vmulq_f32(vcvtq_f32_s32(lower), s));
    }
  }
}

void multiply_pairs(const Product& p, size_t first, size_t last) {
  if (p.rows < 2) return multiply8<Neon>(p, first, last);
  const auto* codes = static_cast<const int8_t*>(p.codes);
  const size_t each = tile_rows(p.rows, 6), steps = (p.k + 7) / 8, bytes = block_bytes8(p.k);
  alignas(64) float unit[6 * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const auto* constants = reinterpret_cast<const float*>(weights + depth8(p.k) * kBlock);
    for (size_t row = 0; row < p.rows; row += each) {
      const size_t rows = p.rows - row < each ? p.rows - row : each;
      const int8_t* own = codes + row * p.stride;
      for (size_t c = 0; c < kBlock; c += kPanel) {
        const auto tile = rows > 4 ? tile_of_pairs<3> : rows > 2 ? tile_of_pairs<2> : tile_of_pairs<1>;
        tile(own, p.stride, rows, weights + c * 4, steps, constants + c, unit + c);
      }
      finish<Neon>(p, row, rows, block * kBlock, kBlock, unit, constants + 2 * kBlock);
    }
  }
}

constexpr InstructionSet with_pairs() {
  InstructionSet set = loops_of<Neon>("neon-i8mm");
  set.multiply8 = multiply_pairs;
  set.multiply4 = multiply4<Neon, multiply_pairs, 1>;
  return set;
}

}  // namespace

extern const InstructionSet kNeonI8mm;
const InstructionSet kNeonI8mm = with_pairs();
}  // namespace u2moe
