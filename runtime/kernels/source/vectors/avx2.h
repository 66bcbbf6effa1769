// AVX2 with FMA: 16 lanes in two registers. If U2MOE_AVX_VNNI is defined before this file is included, products use
// AVX-VNNI.
//
// Otherwise _mm256_maddubs_epi16 adds pairs of products in 16 bits, with saturation. Packing marks the blocks whose
// sums cannot saturate. For other blocks, weights and activations are widened to 16 bits, and pairs are added in 32
// bits.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2 {
  struct Floats { __m256 a, b; };
  struct Ints { __m256i a, b; };

#if defined(U2MOE_AVX_VNNI)
  static constexpr const char* kName = "avx-vnni";
  static constexpr size_t kRows = 6;
  using Wide = Avx2;  // also for weights whose pairs of products exceed 16 bits
#else
  static constexpr const char* kName = "avx2";
  static constexpr size_t kRows = 5;
  struct Wide;
#endif
  static constexpr size_t kPanels = 1;
  static constexpr ptrdiff_t kFar8 = 0;
  static constexpr int kZero = 128;
  using Code = uint8_t;
  using Weights = Ints;
  using Four = __m256i;
  struct Steps { Ints factor, zero; };  // for 4-bit weights; factors have 16 bits

  static Floats set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static Floats abs(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static Floats copy_sign(Floats x, Floats y) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(sign, x.a), _mm256_and_ps(sign, y.a)),
            _mm256_or_ps(_mm256_andnot_ps(sign, x.b), _mm256_and_ps(sign, y.b))};
  }
  static Floats select_less(Floats x, Floats y, Floats yes, Floats no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
  }

  static Ints seti(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static Ints loadi(const int32_t* p) { return {half(p), half(p + 8)}; }
  static Ints addi(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static Ints maxi(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static Ints magnitude_bits(Floats x) {
    const Floats size = abs(x);
    return {_mm256_castps_si256(size.a), _mm256_castps_si256(size.b)};
  }
  static int32_t largest(Ints x) {
    const __m256i both = _mm256_max_epi32(x.a, x.b);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static int32_t total(Ints x) {
    const __m256i both = _mm256_add_epi32(x.a, x.b);
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static Floats to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static Ints round(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static Floats scale_by_power(Floats x, Ints n) {
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), _mm256_slli_epi32(n.a, 23))),
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), _mm256_slli_epi32(n.b, 23)))};
  }

  static void store_bytes(Ints x, uint8_t* p) {
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i words = in_order(_mm256_packus_epi32(_mm256_and_si256(x.a, byte), _mm256_and_si256(x.b, byte)));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static void store_codes(Ints x, Code* p) { store_bytes(x, p); }
  static void codes_of_bytes(const uint8_t* b, Code* p) { std::memcpy(p, b, 16); }
  static Weights load_weights(const uint8_t* p) { return loadi(reinterpret_cast<const int32_t*>(p)); }
  static Four four(const Code* a) { return broadcast(a); }
#if defined(U2MOE_AVX_VNNI)
  static Ints dot(Ints sum, Weights w, Four a) {
    return {_mm256_dpbusd_avx_epi32(sum.a, a, w.a), _mm256_dpbusd_avx_epi32(sum.b, a, w.b)};
  }
#else
  static Ints dot(Ints sum, Weights w, Four a) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w.a), one)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w.b), one))};
  }
#endif
  static void store_weights(Weights w, uint8_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), w.b);
  }
  // One 16-bit multiplication multiplies two bytes by the factor of their group, because no product exceeds 8 bits.
  static Steps steps(const uint8_t* p) {
    const Ints all = columns_of(p), zero = high_halves(all), factor = factors_of(all);
    return {factor, {_mm256_mullo_epi16(zero.a, factor.a), _mm256_mullo_epi16(zero.b, factor.b)}};
  }
  static Ints factors_of(Ints steps) {
    const __m256i low = _mm256_set1_epi16(15);
    return {_mm256_and_si256(steps.a, low), _mm256_and_si256(steps.b, low)};
  }
  // Copies the byte of each column four times.
  static Ints columns_of(const uint8_t* p) {
    const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i columns = _mm256_set_epi32(0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
                                             0x01010101, 0);
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(own), columns),
                      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_srli_si128(own, 8)), columns)};
  }
  static void unpack(const uint8_t* p, const Steps& s, Weights& low, Weights& high) {
    const Ints both = load_weights(p);
    low = unpacked(low_halves(both), s);
    high = unpacked(high_halves(both), s);
  }
  static Ints low_halves(Ints x) {
    const __m256i low = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
  }
  static Ints high_halves(Ints x) { return low_halves({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

 private:
  static Ints unpacked(Ints x, const Steps& s) {
    return {_mm256_sub_epi8(_mm256_mullo_epi16(x.a, s.factor.a), s.zero.a),
            _mm256_sub_epi8(_mm256_mullo_epi16(x.b, s.factor.b), s.zero.b)};
  }
  static __m256i half(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i broadcast(const void* a) {
    int32_t v;
    std::memcpy(&v, a, 4);
    return _mm256_set1_epi32(v);
  }
  // Packing instructions work on each half of a register. This restores the order of the quarters.
  static __m256i in_order(__m256i words) { return _mm256_permute4x64_epi64(words, 0xD8); }
};

#if !defined(U2MOE_AVX_VNNI)
// Widens weights and activations to 16 bits. Even and odd rows are kept apart, so that shifts or masks are
// enough to widen them.
struct Avx2::Wide : Avx2 {
  struct Weights { Ints even, odd; };
  struct Four { __m256i even, odd; };
  static Weights load_weights(const uint8_t* p) {
    const Ints w = Avx2::load_weights(p);
    return {{_mm256_srai_epi16(_mm256_slli_epi16(w.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(w.b, 8), 8)},
            {_mm256_srai_epi16(w.a, 8), _mm256_srai_epi16(w.b, 8)}};
  }
  static Four four(const Code* a) {
    const __m256i bytes = Avx2::four(a);
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
  }
  static Ints dot(Ints sum, const Weights& w, Four a) {
    sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(w.even.a, a.even));
    sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(w.even.b, a.even));
    sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(w.odd.a, a.odd));
    sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(w.odd.b, a.odd));
    return sum;
  }
};
#endif

}  // namespace
