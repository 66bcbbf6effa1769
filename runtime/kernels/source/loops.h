// The loops of every instruction set, written once over its vectors V (vectors/*.h).
//
// Included once by each file in isa/. Everything has internal linkage and nothing of the C++ library is used: an inline
// function compiled for one instruction set must never be the copy that the linker keeps for all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "float_loops.h"
#include "instruction_set.h"
#include "layout.h"

namespace {

using namespace u2moe;

#ifndef U2MOE_NEAR
#define U2MOE_NEAR 4096
#endif
constexpr size_t kNear = U2MOE_NEAR;  // bytes that the first reader of weights prefetches ahead

// ------------------------------------------------------------------------------------------------ activations to integers

// x / divisor, correctly rounded, for many x: a product with the reciprocal, and one correction by the remainder
// (Markstein 1990). It is not proven for divisors whose reciprocal may be subnormal or whose mantissa is all ones.
template <class V>
class Divisor {
 public:
  explicit Divisor(float by) : by_(V::set(by)), inverse_(V::set(1.0f / by)) {
    uint32_t bits;
    std::memcpy(&bits, &by, 4);
    is_plain_ = by > 1e-25f && by < 1e25f && (bits & 0x7FFFFF) != 0x7FFFFF;
  }
  typename V::Floats divide(typename V::Floats x) const {
    if (!is_plain_) return V::div(x, by_);
    const auto quotient = V::mul(x, inverse_);
    return V::fma(V::fma(V::mul(quotient, V::set(-1.0f)), by_, x), inverse_, quotient);
  }

 private:
  typename V::Floats by_, inverse_;
  bool is_plain_;
};

// The largest magnitude, found by comparing bits as integers: NaN is then the largest, wherever it stands.
template <class V>
inline float peak_of(const float* x, size_t count, float lowest) {
  auto most = V::magnitude_bits(V::set(lowest));
  for (size_t i = 0; i < count; i += kPanel) most = V::maxi(most, V::magnitude_bits(load_part<V>(x + i, count - i)));
  const int32_t bits = V::largest(most);
  float peak;
  std::memcpy(&peak, &bits, 4);
  return peak;
}

template <class V, bool kBytes, class Code>
void round_row(const Rounding8& r, const float* x, Code* codes, float* scale_of_row) {
  const float peak = peak_of<V>(x, r.k, r.lowest), scale = r.by_peak ? peak : peak * kStep;
  *scale_of_row = scale;
  const auto zero = V::seti(kBytes ? 128 : V::kZero);
  const Divisor<V> by_scale(scale > 0 ? scale : 1.0f), by_step(kStep);
  for (size_t i = 0; i < r.stride; i += kPanel) {
    auto v = i < r.k ? load_part<V>(x + i, r.k - i) : V::set(0.0f);
    v = by_scale.divide(v);
    if (r.by_peak) v = by_step.divide(v);
    const auto integers = V::addi(V::round(v), zero);
    if constexpr (!kBytes) {
      V::store_codes(integers, codes + i);
    } else if (r.stride - i >= kPanel) {
      V::store_bytes(integers, codes + i);
    } else {
      uint8_t part[kPanel];
      V::store_bytes(integers, part);
      std::memcpy(codes + i, part, r.stride - i);
    }
  }
}

// The stride is a multiple of 16.
template <class V>
void round8(const Rounding8& r, size_t first, size_t last) {
  auto* codes = static_cast<typename V::Code*>(r.codes);
  for (size_t row = first; row < last; row++)
    round_row<V, false>(r, r.x + row * r.k, codes + row * r.stride, r.scale + row);
}

// The stride is k.
template <class V>
void round_bytes(const Rounding8& r, size_t first, size_t last) {
  auto* bytes = static_cast<uint8_t*>(r.codes);
  for (size_t row = first; row < last; row++)
    round_row<V, true>(r, r.x + row * r.k, bytes + row * r.stride, r.scale + row);
}

template <class V>
void from_bytes(const uint8_t* bytes, size_t k, void* to, size_t stride, size_t rows) {
  for (size_t row = 0; row < rows; row++) {
    auto* codes = static_cast<typename V::Code*>(to) + row * stride;
    for (size_t i = 0; i < stride; i += kPanel) {
      uint8_t part[kPanel];
      const size_t count = i < k ? k - i : 0;
      std::memset(part, 128, sizeof part);
      std::memcpy(part, bytes + row * k + (count ? i : 0), count < kPanel ? count : kPanel);
      V::codes_of_bytes(part, codes + i);
    }
  }
}

template <class V>
void round4(const Rounding4& r, size_t first, size_t last) {
  const size_t groups = groups4(r.k, r.group);
  for (size_t row = first; row < last; row++) {
    for (size_t g = 0; g < groups; g++) {
      const size_t start = g * r.group, count = r.k - start < r.group ? r.k - start : r.group;
      const float* x = r.x + row * r.k + start;
      const float peak = peak_of<V>(x, count, 0.0f);
      const auto inverse = V::set(peak != 0 ? 127.0f / peak : 0.0f);
      auto sum = V::seti(0);
      for (size_t i = 0; i < r.group; i += kPanel) {
        const auto v = i < count ? load_part<V>(x + i, count - i) : V::set(0.0f);
        const auto integers = V::round(V::mul(v, inverse));
        sum = V::addi(sum, integers);
        V::store_signed(integers, r.codes + (row * groups + g) * r.group + i);
      }
      r.scale[row * groups + g] = peak / 127.0f;
      r.sum[row * groups + g] = static_cast<int32_t>(-8 * static_cast<uint32_t>(V::total(sum)));
    }
  }
}

// Negative values become 0.
template <class V>
void convolve(const Convolution& c, float* sums) {
  const size_t panels = (c.channels + kPanel - 1) / kPanel, vectors = panels * c.positions;
  for (size_t p = 0; p < panels; p++)
    products<V>(c.positions, c.patches, c.taps, 1, c.weights + p * c.taps * kPanel, c.taps, sums + p * c.positions * kPanel);
  const auto zero = V::set(0.0f);
  auto most = V::magnitude_bits(zero);
  for (size_t i = 0; i < vectors; i++)
    most = V::maxi(most, V::magnitude_bits(V::max(zero, V::load(sums + i * kPanel))));
  const int32_t bits = V::largest(most);
  float peak;
  std::memcpy(&peak, &bits, 4);
  *c.scale = peak * (1.0f / 255);
  const Divisor<V> by(*c.scale > 0 ? *c.scale : 1.0f);
  auto* codes = static_cast<typename V::Code*>(c.codes);
  for (size_t p = 0; p < panels; p++) {
    const size_t first = p * kPanel, count = c.channels - first < kPanel ? c.channels - first : kPanel;
    for (size_t i = 0; i < c.positions; i++) {
      const auto v = by.divide(V::max(zero, V::load(sums + (p * c.positions + i) * kPanel)));
      typename V::Code whole[kPanel];
      auto* to = codes + i * c.channels + first;
      V::store_codes(V::round(v), count < kPanel ? whole : to);
      if (count < kPanel) std::memcpy(to, whole, count * sizeof *to);
    }
  }
}

// ------------------------------------------------------------------------------------------------ what follows a product

// `unit` holds the products of `rows` rows with one block of columns, times the scales of the columns.
template <class V>
inline void finish(const Product& p, size_t row, size_t rows, size_t block, const float* unit, const float* bias) {
  const size_t first = block * kBlock, columns = p.n - first < kBlock ? p.n - first : kBlock;
  for (size_t m = row; m < row + rows; m++, unit += kBlock) {
    const auto scale = V::set(p.scale ? p.scale[m] : 1.0f);
    if (p.then == Then::scatter) {
      float* to = p.out + p.token[m] * p.out_stride + first;
      const auto share = V::set(p.share[m]);
      for (size_t c = 0; c < columns; c += kPanel) {
        const auto sum = V::fma(scale, V::load(unit + c), load_part<V>(to + c, columns - c));
        store_part<V>(to + c, V::fma(share, V::load(bias + c), sum), columns - c);
      }
    } else {
      float* to = p.out + m * p.out_stride + first;
      for (size_t c = 0; c < columns; c += kPanel) {
        auto y = V::add(V::mul(V::load(unit + c), scale), V::load(bias + c));
        if (p.then == Then::hidden) y = activate<V>(y, p.activation);
        if (p.then == Then::gated) y = V::mul(load_part<V>(to + c, columns - c), y);
        store_part<V>(to + c, y, columns - c);
      }
    }
  }
}

// Rows are divided evenly into as few tiles as registers allow.
inline size_t tile_rows(size_t rows, size_t most) {
  const size_t tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

// ------------------------------------------------------------------------------------------------ int8

// How weights come into the cache before they are needed: the only tile of a block, or the first, prefetches its own,
// `kNear` bytes ahead. If there are several tiles, they spread the lines of the next block among them.
struct Ahead {
  const uint8_t* far;
  size_t mask;  // a line of `far` at steps whose number has none of these bits
};

// `weights` points to the panel, `constants` to the scales of the block.
template <class V, int M, bool kIsNear>
inline void tile8(const typename V::Code* codes, size_t stride, const uint8_t* weights, size_t steps,
                  const uint8_t* constants, Ahead ahead, float* unit) {
  constexpr int P = V::kPanels;
  typename V::Ints sum[M][P];
  U2MOE_UNROLL for (int p = 0; p < P; p++) {
    auto start = V::seti(0);
    if constexpr (V::kZero != 0)
      start = V::loadi(reinterpret_cast<const int32_t*>(constants + kBlock * 4) + p * kPanel);
    U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m][p] = start;
  }
  for (size_t s = 0; s < steps; s++) {
    if constexpr (kIsNear) {
      U2MOE_UNROLL for (int p = 0; p < P; p++) U2MOE_PREFETCH(weights + kNear + p * kLine, 3);
    } else if ((s & ahead.mask) == 0) {
      U2MOE_PREFETCH(ahead.far, 2);
      ahead.far += kLine;
    }
    typename V::Weights w[P];
    U2MOE_UNROLL for (int p = 0; p < P; p++) w[p] = V::load_weights(weights + p * kPanel * 4);
    weights += kBlock * 4;
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      const auto four = V::four(codes + m * stride + s * 4);
      U2MOE_UNROLL for (int p = 0; p < P; p++) sum[m][p] = V::dot(sum[m][p], w[p], four);
    }
  }
  U2MOE_UNROLL for (int p = 0; p < P; p++) {
    const auto scale = V::load(reinterpret_cast<const float*>(constants) + p * kPanel);
    U2MOE_UNROLL for (int m = 0; m < M; m++)
      V::store(unit + m * kBlock + p * kPanel, V::mul(V::to_float(sum[m][p]), scale));
  }
}

template <class V, bool kIsNear, int M = static_cast<int>(V::kRows)>
inline void rows8(size_t rows, const typename V::Code* codes, size_t stride, const uint8_t* weights, size_t steps,
                  const uint8_t* constants, Ahead ahead, float* unit) {
  if constexpr (M > 1) {
    if (rows < M) return rows8<V, kIsNear, M - 1>(rows, codes, stride, weights, steps, constants, ahead, unit);
  }
  tile8<V, M, kIsNear>(codes, stride, weights, steps, constants, ahead, unit);
}

template <class V>
void multiply8(const Product& p, size_t first, size_t last) {
  if (p.rows == 0) return;
  const auto* codes = static_cast<const typename V::Code*>(p.codes);
  const size_t each = tile_rows(p.rows, V::kRows), tiles = (p.rows + each - 1) / each;
  const size_t steps = (p.k + 3) / 4, bytes = block_bytes8(p.k);
  constexpr size_t kWidth = V::kPanels * kPanel;  // columns of a tile
  // all tiles of a block together have this many steps for its bytes / 64 lines
  size_t interval = 1;
  while (interval * 2 * bytes <= tiles * (kBlock / kWidth) * steps * kLine) interval *= 2;
  alignas(64) float unit[V::kRows * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const uint8_t* constants = weights + depth8(p.k) * kBlock;
    Ahead ahead{weights + bytes, interval - 1};
    for (size_t row = 0; row < p.rows; row += each) {
      const size_t rows = p.rows - row < each ? p.rows - row : each;
      for (size_t c = 0; c < kBlock; c += kWidth) {
        const auto* own = codes + row * p.stride;
        if (tiles == 1) {
          rows8<V, true>(rows, own, p.stride, weights + c * 4, steps, constants + c * 4, ahead, unit + c);
        } else {
          rows8<V, false>(rows, own, p.stride, weights + c * 4, steps, constants + c * 4, ahead, unit + c);
          ahead.far += (steps + ahead.mask) / interval * kLine;
        }
      }
      finish<V>(p, row, rows, block, unit, reinterpret_cast<const float*>(constants + kBlock * 8));
    }
  }
}

// ------------------------------------------------------------------------------------------------ int4

constexpr size_t kRows4Step = 8;  // weights of a byte and its neighbour in the other half

// One panel: the unpacked halves serve all rows.
template <class V, int M, bool kIsNear>
inline void tile4(const Product& p, const int8_t* codes, size_t row, const uint8_t* weights, float* unit) {
  const size_t groups = groups4(p.k, p.group);
  const float* group_scale = p.group_scale + row * groups;
  const int32_t* group_sum = p.group_sum + row * groups;
  typename V::Floats total[M];
  U2MOE_UNROLL for (int m = 0; m < M; m++) total[m] = V::set(0.0f);
  for (size_t g = 0; g < groups; g++) {
    typename V::Ints sum[M];
    U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m] = V::seti(group_sum[m * groups + g]);
    const int8_t* own = codes + g * p.group;
    for (size_t k = 0; k < p.group; k += 2 * kRows4Step) {
      typename V::Sums4 sums[M];
      U2MOE_UNROLL for (int m = 0; m < M; m++) sums[m] = V::sums_from(sum[m]);
      U2MOE_UNROLL for (int half = 0; half < 2; half++) {
        if constexpr (kIsNear) U2MOE_PREFETCH(weights + kNear, 3);
        typename V::Nibbles low, high;
        V::load_nibbles(weights, low, high);
        weights += kPanel * 4;
        U2MOE_UNROLL for (int m = 0; m < M; m++) {
          sums[m] = V::dot4(sums[m], low, V::four4(own + m * p.stride));
          sums[m] = V::dot4(sums[m], high, V::four4(own + m * p.stride + 4));
        }
        own += kRows4Step;
      }
      U2MOE_UNROLL for (int m = 0; m < M; m++) sum[m] = V::sums_to(sums[m], sum[m]);
    }
    if constexpr (kIsNear) U2MOE_PREFETCH(weights + kNear, 3);
    const auto scale = V::load(reinterpret_cast<const float*>(weights));
    weights += kPanel * 4;
    U2MOE_UNROLL for (int m = 0; m < M; m++) {
      const auto both = V::mul(scale, V::set(group_scale[m * groups + g]));
      total[m] = V::fma(V::to_float(sum[m]), both, total[m]);
    }
  }
  U2MOE_UNROLL for (int m = 0; m < M; m++) V::store(unit + m * kBlock, total[m]);
}

template <class V, bool kIsNear, int M = static_cast<int>(V::kRows4)>
inline void rows4(size_t rows, const Product& p, const int8_t* codes, size_t row, const uint8_t* weights, float* unit) {
  if constexpr (M > 1) {
    if (rows < M) return rows4<V, kIsNear, M - 1>(rows, p, codes, row, weights, unit);
  }
  tile4<V, M, kIsNear>(p, codes, row, weights, unit);
}

template <class V>
void multiply4(const Product& p, size_t first, size_t last) {
  if (p.rows == 0) return;
  const auto* codes = static_cast<const int8_t*>(p.codes);
  const size_t each = tile_rows(p.rows, V::kRows4), bytes = block_bytes4(p.k, p.group);
  alignas(64) float unit[V::kRows4 * kBlock];
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const auto* bias = reinterpret_cast<const float*>(weights + bytes - kBlock * 4);
    for (size_t row = 0; row < p.rows; row += each) {
      const size_t rows = p.rows - row < each ? p.rows - row : each;
      for (size_t c = 0; c < kBlock; c += kPanel) {
        const int8_t* own = codes + row * p.stride;
        const uint8_t* panel = weights + c / kPanel * panel_bytes4(p.k, p.group);
        if (row == 0)
          rows4<V, true>(rows, p, own, row, panel, unit + c);
        else
          rows4<V, false>(rows, p, own, row, panel, unit + c);
      }
      finish<V>(p, row, rows, block, unit, bias);
    }
  }
}

// ------------------------------------------------------------------------------------------------ the router

// Logits of one token; four sums, of every fourth input each, hide the latency of additions.
template <class V>
inline void logits_of(const Routing& r, const float* x, float* logits) {
  const size_t width = rounded_up(r.experts, kPanel);
  for (size_t e = 0; e < width; e += kPanel) {
    const float* gate = r.gate + e;
    typename V::Floats sum[4];
    U2MOE_UNROLL for (int i = 0; i < 4; i++) sum[i] = V::set(0.0f);
    size_t d = 0;
    for (; d + 4 <= r.dim; d += 4) {
      U2MOE_UNROLL for (int i = 0; i < 4; i++) sum[i] = V::fma(V::set(x[d + i]), V::load(gate + (d + i) * width), sum[i]);
    }
    for (; d < r.dim; d++) sum[0] = V::fma(V::set(x[d]), V::load(gate + d * width), sum[0]);
    V::store(logits + e, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  }
}

// The largest logits first, the lower number first if they are equal; NaN only if there is nothing else.
inline void choose(const Routing& r, float* logits, uint32_t* expert, float* values) {
  bool is_taken[kMostExperts] = {};
  for (size_t j = 0; j < r.top_k; j++) {
    size_t best = r.experts;
    for (size_t e = 0; e < r.experts; e++)
      if (!is_taken[e] && (best == r.experts || logits[e] > logits[best] || logits[best] != logits[best])) best = e;
    is_taken[best] = true;
    expert[j] = static_cast<uint32_t>(best);
    values[j] = logits[best];
  }
}

template <class V>
void route(const Routing& r, size_t first, size_t last) {
  alignas(64) float logits[kMostExperts], shares[kMostExperts];
  for (size_t token = first; token < last; token++) {
    uint32_t* expert = r.expert + token * r.top_k;
    logits_of<V>(r, r.x + token * r.dim, logits);
    choose(r, logits, expert, shares);
    const auto highest = V::set(shares[0]);
    for (size_t j = 0; j < r.top_k; j += kPanel) {
      const auto values = load_part<V>(shares + j, r.top_k - j);
      store_part<V>(shares + j, exponential<V>(V::sub(values, highest)), r.top_k - j);
    }
    float sum = 0;
    for (size_t j = 0; j < r.top_k; j++) sum += shares[j];
    for (size_t j = 0; j < r.top_k; j++) shares[j] /= sum;
    if (r.skip_below > 0) {  // what remains is normalised again
      const float least = shares[0] < r.skip_below ? shares[0] : r.skip_below;
      float kept = 0;
      for (size_t j = 0; j < r.top_k; j++) {
        if (shares[j] < least) {
          shares[j] = 0;
          expert[j] = static_cast<uint32_t>(r.experts);
        }
        kept += shares[j];
      }
      for (size_t j = 0; j < r.top_k; j++) shares[j] /= kept;
    }
    std::memcpy(r.share + token * r.top_k, shares, r.top_k * sizeof(float));
  }
}

template <class V>
constexpr InstructionSet loops_of(const char* name = V::kName) {
  return {name,      sizeof(typename V::Code), round8<V>,    round_bytes<V>, from_bytes<V>,
          round4<V>, multiply8<V>,             multiply4<V>, route<V>,
          V::kZero != 0 || sizeof(typename V::Code) > 1, convolve<V>, attend<V>, normalize<V>, see<V>, convolve_in_time<V>};
}

}  // namespace
