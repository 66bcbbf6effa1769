// 16 lanes in plain C++, for processors without supported vector instructions. This file defines what the other files
// in this folder must compute.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Scalar {
  static constexpr const char* kName = "scalar";
  static constexpr size_t kRows = 4, kPanels = 1;
  static constexpr ptrdiff_t kFar8 = 0;  // bytes by which int8 products with few rows prefetch weights; 0: not at all
  static constexpr int kZero = 0;
  using Wide = Scalar;  // also for weights whose pairs of products exceed 16 bits
  using Code = int8_t;

  struct Floats { float v[16]; };
  struct Ints { int32_t v[16]; };
  struct Weights { int8_t v[64]; };
  struct Four { int32_t v[4]; };
  struct Steps { uint8_t v[16]; };  // for 4-bit weights

  template <class F> static Floats each(F f) { Floats r; for (int i = 0; i < 16; i++) r.v[i] = f(i); return r; }
  template <class F> static Ints each_int(F f) { Ints r; for (int i = 0; i < 16; i++) r.v[i] = f(i); return r; }

  static Floats set(float x) { return each([&](int) { return x; }); }
  static Floats load(const float* p) { Floats r; std::memcpy(r.v, p, 64); return r; }
  static void store(float* p, Floats a) { std::memcpy(p, a.v, 64); }
  static Floats add(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static Floats sub(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static Floats mul(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static Floats div(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  // Returns a * b + c, rounded once. fmaf is not exact in every C library. The product is exact in double. The sum
  // is rounded to odd: if it is inexact (Knuth's TwoSum), its last bit is set. Rounding to float is then correct.
  static float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    double sum = product + c;
    const double added = sum - product, lost = (product - (sum - added)) + (c - added);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if ((lost > 0 || lost < 0) && (bits & 1) == 0) bits = (lost > 0) == (sum > 0) ? bits + 1 : bits - 1;
    std::memcpy(&sum, &bits, sizeof bits);
    return static_cast<float>(sum);
  }
  static Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); }); }
  static Floats min(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats max(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats abs(Floats a) { return each([&](int i) { return fabsf(a.v[i]); }); }
  static Floats copy_sign(Floats a, Floats b) { return each([&](int i) { return copysignf(a.v[i], b.v[i]); }); }
  static Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
    return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }

  static Ints seti(int32_t x) { return each_int([&](int) { return x; }); }
  static Ints loadi(const int32_t* p) { Ints r; std::memcpy(r.v, p, 64); return r; }
  // Additions wrap around, as in vector registers. They can overflow, because NaN becomes the lowest integer.
  static int32_t sum_of(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static Ints addi(Ints a, Ints b) { return each_int([&](int i) { return sum_of(a.v[i], b.v[i]); }); }
  static Ints maxi(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Ints magnitude_bits(Floats a) { Ints r; std::memcpy(r.v, abs(a).v, 64); return r; }
  static int32_t largest(Ints a) { int32_t r = a.v[0]; for (int32_t x : a.v) r = x > r ? x : r; return r; }
  static int32_t total(Ints a) { int32_t r = 0; for (int32_t x : a.v) r = sum_of(r, x); return r; }
  static Floats to_float(Ints a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
  static Ints round(Floats a) {  // half to even; values that do not fit become the lowest integer, as on x86
    return each_int([&](int i) {
      return fabsf(a.v[i]) < 2147483648.0f ? static_cast<int32_t>(nearbyintf(a.v[i])) : INT32_MIN;
    });
  }
  static Floats scale_by_power(Floats a, Ints n) { return each([&](int i) { return ldexpf(a.v[i], n.v[i]); }); }

  static void store_bytes(Ints a, uint8_t* p) { for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(a.v[i]); }
  static void store_codes(Ints a, Code* p) { for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(a.v[i]); }
  static void codes_of_bytes(const uint8_t* b, Code* p) { for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(b[i] - 128); }

  static Weights load_weights(const uint8_t* p) { Weights r; std::memcpy(r.v, p, 64); return r; }
  static Four four(const Code* a) { return {{a[0], a[1], a[2], a[3]}}; }
  static Ints dot(Ints sum, const Weights& w, Four a) {
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 4; k++) sum.v[i] += w.v[4 * i + k] * a.v[k];
    return sum;
  }

  static void store_weights(const Weights& w, uint8_t* p) { std::memcpy(p, w.v, 64); }
  static Steps steps(const uint8_t* p) { Steps r; std::memcpy(r.v, p, 16); return r; }
  static void unpack(const uint8_t* p, const Steps& s, Weights& low, Weights& high) {
    for (int i = 0; i < 64; i++) {
      const int factor = s.v[i / 4] & 15, zero = s.v[i / 4] >> 4;
      low.v[i] = static_cast<int8_t>(((p[i] & 15) - zero) * factor);
      high.v[i] = static_cast<int8_t>(((p[i] >> 4) - zero) * factor);
    }
  }
};

}  // namespace
