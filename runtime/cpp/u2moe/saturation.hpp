// Products of uint8 and int8 that some processors compute wrongly; see runtime/model/saturation.py.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>

namespace u2moe {

/// Whether onnxruntime's products of uint8 and int8 are exact on this processor. x86 without VNNI adds two products in 16 bits,
/// which saturate.
/// @param fits whether the weights are such that no pair of products exceeds 16 bits.
inline bool has_exact_products(const Ort::Env& env, bool fits) {
  // The ONNX graph y = MatMulInteger(a, b) of uint8 a, int8 b and int32 y.
  static constexpr unsigned char kProduct[] =
      "\x08\x07\x3a\x3e\x0a\x18\x0a\x01\x61\x0a\x01\x62\x12\x01\x79\x22\x0d\x4d\x61\x74\x4d\x75\x6c\x49\x6e\x74\x65\x67\x65\x72"
      "\x12\x01\x67\x5a\x09\x0a\x01\x61\x12\x04\x0a\x02\x08\x02\x5a\x09\x0a\x01\x62\x12\x04\x0a\x02\x08\x03\x62\x09\x0a\x01\x79"
      "\x12\x04\x0a\x02\x08\x06\x42\x04\x0a\x00\x10\x0d";
  constexpr int kDepth = 4, kColumns = 6;
  using Weights = std::array<std::int8_t, kDepth * kColumns>;
  static constexpr Weights kLargest = {127, 127, 127, 127, 127, 127, 127, 127, 127, 127, 127, 127,
                                       127, 127, 127, 127, 127, 127, 127, 127, 127, 127, 127, 127};
  // The most extreme weights for which each pair of rows fits into 16 bits.
  static constexpr Weights kPaired = {127, 64, 0, 127, -127, -64, 0, 64, 127, -127, 0,  -64,
                                      127, 64, 1, -127, -1,  -64, 1, 64, 127, 127, -127, -64};
  static constexpr std::uint8_t kActivations[3 * kDepth] = {255, 255, 255, 255, 255, 0, 255, 0, 0, 255, 0, 255};
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  Ort::Session session(env, kProduct, sizeof kProduct - 1, options);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Weights weights = fits ? kPaired : kLargest;
  for (const int num_rows : {3, 1}) {  // one row has a kernel of its own
    for (int first = 0; first < 3; first += num_rows) {
      std::array<std::uint8_t, 3 * kDepth> rows{};
      const auto* begin = kActivations + first * kDepth;
      std::copy(begin, begin + num_rows * kDepth, rows.begin());
      const std::array<int64_t, 2> left = {num_rows, kDepth}, right = {kDepth, kColumns};
      const Ort::Value inputs[] = {
          Ort::Value::CreateTensor<std::uint8_t>(memory, rows.data(), static_cast<std::size_t>(num_rows * kDepth), left.data(), 2),
          Ort::Value::CreateTensor<std::int8_t>(memory, weights.data(), weights.size(), right.data(), 2)};
      const char *names[] = {"a", "b"}, *output = "y";
      const auto found = session.Run(Ort::RunOptions{nullptr}, names, inputs, 2, &output, 1);
      const auto* products = found[0].GetTensorData<std::int32_t>();
      for (int row = 0; row < num_rows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
          std::int32_t expected = 0;
          for (int k = 0; k < kDepth; ++k) {
            expected += rows[static_cast<std::size_t>(row * kDepth + k)] * weights[static_cast<std::size_t>(k * kColumns + column)];
          }
          if (products[row * kColumns + column] != expected) return false;
        }
      }
    }
  }
  return true;
}

}  // namespace u2moe
