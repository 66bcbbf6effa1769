// Rounding of activations to integers.
#pragma once
#include "lanes.h"

namespace {

// Divides values by one number, with correct rounding: multiplies by the reciprocal, then corrects once by the
// remainder (Markstein 1990). The proof excludes divisors whose mantissa is all ones or whose reciprocal is
// subnormal; for such divisors, a division is used.
template <class V>
class Divisor {
 public:
  explicit Divisor(float by) : by_(V::set(by)), minus_(V::set(-by)), inverse_(V::set(1.0f / by)) {
    uint32_t bits;
    std::memcpy(&bits, &by, 4);
    is_plain_ = by > 1e-25f && by < 1e25f && (bits & 0x7FFFFF) != 0x7FFFFF;
  }
  typename V::Floats divide(typename V::Floats x) const {
    if (!is_plain_) return V::div(x, by_);
    const auto quotient = V::mul(x, inverse_);
    return V::fma(V::fma(quotient, minus_, x), inverse_, quotient);
  }

 private:
  typename V::Floats by_, minus_, inverse_;
  bool is_plain_;
};

// Returns the largest magnitude among `x` and `lowest`. Bits are compared as integers, so that NaN counts as the
// largest wherever it occurs.
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
  const float scale = peak_of<V>(x, r.k, r.lowest) * kStep;
  *scale_of_row = scale;
  const auto zero = V::seti(kBytes ? 128 : V::kZero);
  const Divisor<V> by_scale(scale > 0 ? scale : 1.0f);
  for (size_t i = 0; i < r.stride; i += kPanel) {
    const auto v = i < r.k ? load_part<V>(x + i, r.k - i) : V::set(0.0f);
    const auto integers = V::addi(V::round(by_scale.divide(v)), zero);
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

// Rounds rows for products. The stride must be a multiple of 16.
template <class V>
void round8(const Rounding8& r, size_t first, size_t last) {
  auto* codes = static_cast<typename V::Code*>(r.codes);
  for (size_t row = first; row < last; row++)
    round_row<V, false>(r, r.x + row * r.k, codes + row * r.stride, r.scale + row);
}

// Rounds rows to uint8 around 128. The stride must be k.
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

}  // namespace
