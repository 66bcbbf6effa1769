// AVX-512 with VNNI: 16 lanes in one register.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512-vnni";
  static constexpr size_t kRows = 14, kPanels = 2;
  static constexpr ptrdiff_t kFar8 = 0;
  static constexpr int kZero = 128;  // the instruction multiplies unsigned activations by signed weights
  using Wide = Avx512;  // also for weights whose pairs of products exceed 16 bits
  using Code = uint8_t;
  using Floats = __m512;
  using Ints = __m512i;
  using Weights = __m512i;
  using Four = __m512i;
  struct Steps { __m512i factor, zero; };  // for 4-bit weights; factors have 16 bits

  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats abs(Floats a) { return _mm512_abs_ps(a); }
  static Floats copy_sign(Floats a, Floats b) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b), _mm512_castps_si512(a), 0xCA));
  }
  static Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }

  static Ints seti(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints loadi(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Ints addi(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints maxi(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static Ints magnitude_bits(Floats a) { return _mm512_castps_si512(abs(a)); }
  static int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a); }
  static int32_t total(Ints a) {  // sums wrap around, which _mm512_reduce_add_epi32 does not guarantee
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Ints round(Floats a) { return _mm512_cvtps_epi32(a); }
  static Floats scale_by_power(Floats a, Ints n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));
  }

  static void store_bytes(Ints a, uint8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void store_codes(Ints a, Code* p) { store_bytes(a, p); }
  static void codes_of_bytes(const uint8_t* b, Code* p) { std::memcpy(p, b, 16); }

  static Weights load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Four four(const Code* a) {
    int32_t v;
    std::memcpy(&v, a, 4);
    return _mm512_set1_epi32(v);
  }
  static Ints dot(Ints sum, Weights w, Four a) {
#if defined(__GNUC__)
    // GCC 12 to 14 would copy accumulators before and after the intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, a, w);
#endif
  }

  static void store_weights(Weights w, uint8_t* p) { _mm512_storeu_si512(p, w); }
  // A single 16-bit multiplication can multiply two bytes by their group's factor, because no product exceeds 8 bits.
  static Steps steps(const uint8_t* p) {
    const __m512i columns = _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A, 0x09090909,
        0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i all = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(own), columns);
    const __m512i factor = _mm512_and_si512(all, _mm512_set1_epi16(15));
    return {factor, _mm512_mullo_epi16(halves(_mm512_srli_epi16(all, 4)), factor)};
  }
  static void unpack(const uint8_t* p, const Steps& s, Weights& low, Weights& high) {
    const __m512i both = _mm512_loadu_si512(p);
    low = _mm512_sub_epi8(_mm512_mullo_epi16(halves(both), s.factor), s.zero);
    high = _mm512_sub_epi8(_mm512_mullo_epi16(halves(_mm512_srli_epi16(both, 4)), s.factor), s.zero);
  }

 private:
  static __m512i halves(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
};

}  // namespace
