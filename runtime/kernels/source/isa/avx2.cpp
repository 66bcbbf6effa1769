// AVX2 without VNNI. In int4, products with 4-bit weights are added in 16 bits. These sums are then multiplied by the
// step of their group, and added in pairs in 32 bits. In int8, sums of more than two products may exceed 16 bits. So
// each sum of two products is immediately multiplied by one, which widens it to 32 bits.
#include "../loops.h"
#include "../vectors/avx2.h"

namespace u2moe {
namespace {

constexpr size_t kRowsOfSum = 16;  // rows per sum; a 16-bit lane adds half of their products, up to 255 * 15 each
constexpr size_t kFewRows = 2, kMoreRows = 3;

// 4-bit weights minus their zero points, not yet multiplied by steps.
struct Plain : Avx2 {
  static Steps steps(const uint8_t* p) {
    const Ints all = columns_of(p);
    return {factors_of(all), high_halves(all)};
  }
  static void unpack(const uint8_t* p, const Steps& s, Weights& low, Weights& high) {
    const Ints both = load_weights(p), first = low_halves(both), second = high_halves(both);
    low = {_mm256_sub_epi8(first.a, s.zero.a), _mm256_sub_epi8(first.b, s.zero.b)};
    high = {_mm256_sub_epi8(second.a, s.zero.a), _mm256_sub_epi8(second.b, s.zero.b)};
  }
  template <int M>
  static void add_pairs(Ints (&sum)[M], Weights w, const uint8_t* codes, size_t stride) {
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      const Four a = four(codes + m * stride);
      sum[m].a = _mm256_add_epi16(sum[m].a, _mm256_maddubs_epi16(a, w.a));
      sum[m].b = _mm256_add_epi16(sum[m].b, _mm256_maddubs_epi16(a, w.b));
#if defined(__GNUC__)
      asm("" : "+x"(sum[m].a), "+x"(sum[m].b));  // without this, GCC multiplies all first and adds in a tree
#endif
    }
  }
  static Ints add_sums(Ints total, Ints sum, const Steps& s) {
    return addi(total, {_mm256_madd_epi16(sum.a, s.factor.a), _mm256_madd_epi16(sum.b, s.factor.b)});
  }
};

// Multiplies M rows by one panel of packed or unpacked weights.
template <int M, bool kIsPacked>
void tile(const Product& p, const uint8_t* codes, const uint8_t* steps, const uint8_t* weights, const uint8_t* constants,
          float* unit) {
  const size_t depth = depth8(p.k);
  Sums<Plain, M> total;
  start_sums<Plain, M>(total);
  for (size_t first = 0; first < p.k; first += p.group, steps += kBlock) {
    const auto own = Plain::steps(steps);
    for (size_t k = first; k < first + p.group && k < depth; k += kRowsOfSum) {
      Plain::Ints sum[M];
      U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m] = Plain::seti(0);
      U2MOE_UNROLL for (size_t i = k; i < k + kRowsOfSum; i += kRows4) {
        Plain::Weights low, high;
        if constexpr (kIsPacked) {
          prefetch4(weights + kFar);
          Plain::unpack(weights, own, low, high);
        } else {
          low = Plain::load_weights(weights + i * kBlock);
          high = Plain::load_weights(weights + (i + 4) * kBlock);
        }
        Plain::add_pairs(sum, low, codes + i, p.stride);
        Plain::add_pairs(sum, high, codes + i + 4, p.stride);
        if constexpr (kIsPacked) weights += kBlock * 4;
      }
      U2MOE_UNROLL for (int m = 0; m < M; m++) total[m][0] = Plain::add_sums(total[m][0], sum[m], own);
    }
  }
  store_sums<Plain, M>(total, constants, unit);
}

void multiply_groups(const Product& p, size_t first, size_t last) {
  const size_t bytes = block_bytes4(p.k, p.group);
  const auto* codes = static_cast<const uint8_t*>(p.codes);
  alignas(64) float unit[kMoreRows * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* steps = p.weights + block * bytes;
    const uint8_t *packed = steps + step_bytes4(p.k, p.group), *constants = steps + bytes - 12 * kBlock;
    if (p.rows > kFewRows) unpack_block<Plain>(p, steps, p.room);
    for (size_t c = 0; c < kBlock; c += kPanel) {
      const uint8_t *more = p.room + c * 4, *few = packed + c * 4, *own = constants + c * 4;
      const size_t each = tile_rows(p.rows, kMoreRows);
      for (size_t row = 0; row < p.rows; row += each) {
        const size_t rows = p.rows - row < each ? p.rows - row : each;
        const uint8_t* from = codes + row * p.stride;
        if (p.rows <= kFewRows)
          rows == 1 ? tile<1, true>(p, from, steps + c, few, own, unit) : tile<2, true>(p, from, steps + c, few, own, unit);
        else
          rows == 1   ? tile<1, false>(p, from, steps + c, more, own, unit)
          : rows == 2 ? tile<2, false>(p, from, steps + c, more, own, unit)
                      : tile<3, false>(p, from, steps + c, more, own, unit);
        finish<Plain>(p, row, rows, block * kBlock + c, kPanel, unit, reinterpret_cast<const float*>(own + 8 * kBlock));
      }
    }
  }
}

constexpr InstructionSet with_groups() {
  InstructionSet set = loops_of<Avx2>();
  set.multiply4 = multiply_groups;
  return set;
}

}  // namespace

extern const InstructionSet kAvx2;
const InstructionSet kAvx2 = with_groups();
}  // namespace u2moe
