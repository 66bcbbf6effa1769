// Activations and the exponential, lane by lane. Multiplications and additions are fused only where fma is written, so
// that results are equal on every instruction set. In minima and maxima, the limit is the first argument, so that NaN
// remains NaN.
//
// Each file in isa/ includes this file once. Everything has internal linkage, because code for one instruction set must
// not be merged with code for another.
#pragma once
#include "../instruction_set.h"

namespace {

// p[0] x^(N-1) + ... + p[N-1]
template <class V, size_t N>
inline typename V::Floats polynomial(typename V::Floats x, const float (&p)[N]) {
  auto sum = V::set(p[0]);
  for (size_t i = 1; i < N; i++) sum = V::fma(sum, x, V::set(p[i]));
  return sum;
}

// e^x, relative error below 2e-7; x is limited to -87 .. 88.
template <class V>
inline typename V::Floats exponential(typename V::Floats x) {
  static constexpr float kTaylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  x = V::min(V::set(88.0f), V::max(V::set(-87.0f), x));
  const auto n = V::round(V::mul(x, V::set(1.44269504f)));
  const auto whole = V::to_float(n);
  auto r = V::fma(whole, V::set(-0.693145752f), x);
  r = V::fma(whole, V::set(-1.42860677e-6f), r);
  return V::scale_by_power(polynomial<V>(r, kTaylor), n);
}

// 1 / (1 + e^-x), by the same rational function as in onnxruntime, so that later rounding gives the graph's results.
template <class V>
inline typename V::Floats sigmoid(typename V::Floats x) {
  static constexpr float kAbove[] = {4.37031012579801e-11f, 1.15627324459942e-07f, 6.08574864600143e-05f,
                                     8.51377133304701e-03f, 2.48287947061529e-01f};
  static constexpr float kBelow[] = {6.10247389755681e-13f, 5.76102136993427e-09f, 6.29106785017040e-06f,
                                     1.70198817374094e-03f, 1.16817656904453e-01f, 9.93151921023180e-01f};
  x = V::min(V::set(18.0f), V::max(V::set(-18.0f), x));
  const auto square = V::mul(x, x);
  const auto above = V::mul(polynomial<V>(square, kAbove), x);
  return V::add(V::div(above, polynomial<V>(square, kBelow)), V::set(0.5f));
}

// tanh(x), by the same rational function as in onnxruntime.
template <class V>
inline typename V::Floats hyperbolic_tangent(typename V::Floats x) {
  static constexpr float kAbove[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                                     5.12229709037114e-08f,  1.48572235717979e-05f, 6.37261928875436e-04f,
                                     4.89352455891786e-03f};
  static constexpr float kBelow[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                                     4.89352518554385e-03f};
  x = V::min(V::set(9.0f), V::max(V::set(-9.0f), x));
  const auto square = V::mul(x, x);
  return V::div(V::mul(polynomial<V>(square, kAbove), x), polynomial<V>(square, kBelow));
}

// The error function, with an absolute error below 1.3e-7. For |x| < 0.92, it is computed as an odd polynomial;
// otherwise, as 1 - e^q with the sign of x, where q is a polynomial. The polynomials were fitted at Chebyshev nodes.
template <class V>
inline typename V::Floats error_function(typename V::Floats x) {
  static constexpr float kSmall[] = {8.33997199e-05f, -0.000813607486f, 0.00520050174f, -0.0268592114f,
                                     0.112836927f,   -0.376126336f,   1.12837917f};
  static constexpr float kLarge[] = {1.62934362e-06f, -4.58699574e-05f, 0.000594931169f, -0.00474944302f, 0.0263883511f,
                                     -0.11001539f,    -0.631902252f,    -1.13018445f,    0.000306981396f};
  const auto size = V::min(V::set(3.925f), V::abs(x));
  const auto square = V::mul(size, size);
  const auto small = V::mul(polynomial<V>(square, kSmall), size);
  const auto large = V::sub(V::set(1.0f), exponential<V>(polynomial<V>(size, kLarge)));
  return V::copy_sign(V::select_less(size, V::set(0.921875f), small, large), x);
}

template <class V>
inline typename V::Floats activate(typename V::Floats x, u2moe::Activation kind) {
  using u2moe::Activation;
  const auto zero = V::set(0.0f);
  switch (kind) {
    case Activation::relu:
      return V::max(zero, x);
    case Activation::swish:
      return V::mul(x, sigmoid<V>(x));
    case Activation::gelu:
      return V::mul(V::mul(x, V::set(0.5f)), V::add(error_function<V>(V::div(x, V::set(1.41421356f))), V::set(1.0f)));
    case Activation::tanh:
      return hyperbolic_tangent<V>(x);
    case Activation::hardtanh:
      return V::min(V::set(1.0f), V::max(V::set(-1.0f), x));
    case Activation::selu: {
      const auto negative = V::mul(V::set(1.67326319f), V::sub(exponential<V>(x), V::set(1.0f)));
      return V::mul(V::set(1.05070102f), V::select_less(x, zero, negative, x));
    }
  }
  return x;
}

}  // namespace
