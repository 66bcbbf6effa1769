// NEON: 16 lanes in four registers. With __ARM_FEATURE_DOTPROD, products use the dot product instruction.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Neon {
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr const char* kName = "neon-dot";
#else
  static constexpr const char* kName = "neon";
#endif
  static constexpr size_t kRows = 6, kPanels = 1;
  static constexpr ptrdiff_t kFar8 = 0;
  static constexpr int kZero = 0;
  using Wide = Neon;  // also for weights whose pairs of products exceed 16 bits
  using Code = int8_t;

  struct Floats { float32x4_t v[4]; };
  struct Ints { int32x4_t v[4]; };
  struct Weights { int8x16_t v[4]; };
  using Four = int8x16_t;
  struct Steps { uint8x16_t factor[4], zero[4]; };  // for 4-bit weights

  template <class R, class F>
  static R each(F f) {
    R r;
    for (int i = 0; i < 4; i++) r.v[i] = f(i);
    return r;
  }

  static Floats set(float x) { return each<Floats>([&](int) { return vdupq_n_f32(x); }); }
  static Floats load(const float* p) { return each<Floats>([&](int i) { return vld1q_f32(p + 4 * i); }); }
  static void store(float* p, Floats a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static Floats add(Floats a, Floats b) { return each<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
  static Floats sub(Floats a, Floats b) { return each<Floats>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
  static Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
  static Floats div(Floats a, Floats b) { return each<Floats>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
  static Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static Floats min(Floats a, Floats b) { return each<Floats>([&](int i) { return vminq_f32(a.v[i], b.v[i]); }); }
  static Floats max(Floats a, Floats b) { return each<Floats>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
  static Floats abs(Floats a) { return each<Floats>([&](int i) { return vabsq_f32(a.v[i]); }); }
  static Floats copy_sign(Floats a, Floats b) {
    return each<Floats>([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), b.v[i], a.v[i]); });
  }
  static Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
    return each<Floats>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]); });
  }

  static Ints seti(int32_t x) { return each<Ints>([&](int) { return vdupq_n_s32(x); }); }
  static Ints loadi(const int32_t* p) { return each<Ints>([&](int i) { return vld1q_s32(p + 4 * i); }); }
  static Ints addi(Ints a, Ints b) { return each<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
  static Ints maxi(Ints a, Ints b) { return each<Ints>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); }); }
  static Ints magnitude_bits(Floats a) {
    return each<Ints>([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(a.v[i])); });
  }
  static int32_t largest(Ints a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
  }
  static int32_t total(Ints a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
  }
  static Floats to_float(Ints a) { return each<Floats>([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
  static Ints round(Floats a) { return each<Ints>([&](int i) { return vcvtnq_s32_f32(a.v[i]); }); }
  static Floats scale_by_power(Floats a, Ints n) {
    return each<Floats>([&](int i) {
      return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v[i]), vshlq_n_s32(n.v[i], 23)));
    });
  }

  static int8x16_t narrowed(Ints a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
  }
  static void store_codes(Ints a, Code* p) { vst1q_s8(p, narrowed(a)); }
  static void store_bytes(Ints a, uint8_t* p) { vst1q_u8(p, vreinterpretq_u8_s8(narrowed(a))); }
  static void codes_of_bytes(const uint8_t* b, Code* p) {
    vst1q_s8(p, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(b), vdupq_n_u8(128))));
  }

  static Weights load_weights(const uint8_t* p) {
    return each<Weights>([&](int i) { return vreinterpretq_s8_u8(vld1q_u8(p + 16 * i)); });
  }
  static Four four(const Code* a) {
    int32_t v;
    std::memcpy(&v, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
  }
  static Ints dot(Ints sum, const Weights& w, Four a) {
    for (int i = 0; i < 4; i++) sum.v[i] = dot_of(sum.v[i], w.v[i], a);
    return sum;
  }

  static void store_weights(const Weights& w, uint8_t* p) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, vreinterpretq_u8_s8(w.v[i]));
  }
  static Steps steps(const uint8_t* p) {
    const uint8x16_t own = vld1q_u8(p), columns = vreinterpretq_u8_u32(vmulq_n_u32(vld1q_u32(kColumns), 0x01010101));
    Steps s;
    for (int i = 0; i < 4; i++) {
      const uint8x16_t all = vqtbl1q_u8(own, vaddq_u8(columns, vdupq_n_u8(static_cast<uint8_t>(4 * i))));
      s.factor[i] = vandq_u8(all, vdupq_n_u8(15));
      s.zero[i] = vmulq_u8(vshrq_n_u8(all, 4), s.factor[i]);
    }
    return s;
  }
  static void unpack(const uint8_t* p, const Steps& s, Weights& low, Weights& high) {
    for (int i = 0; i < 4; i++) {
      const uint8x16_t both = vld1q_u8(p + 16 * i);
      const auto weight = [&](uint8x16_t x) { return vreinterpretq_s8_u8(vsubq_u8(vmulq_u8(x, s.factor[i]), s.zero[i])); };
      low.v[i] = weight(vandq_u8(both, vdupq_n_u8(15)));
      high.v[i] = weight(vshrq_n_u8(both, 4));
    }
  }

 private:
  static constexpr uint32_t kColumns[4] = {0, 1, 2, 3};
  static int32x4_t dot_of(int32x4_t sum, int8x16_t w, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, w, a);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, a));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
  }
};

}  // namespace
