// Made by declare.py from runtime/bundle/functions.py and runtime/graph/activation.py; do not edit.
#pragma once
#include <cstddef>
#include <cstdint>

namespace u2moe {

// Version of the operators' inputs, attributes and results.
constexpr int64_t kContract = 3;
// Version of the layout of packed weights.
constexpr int64_t kLayout = 4;
// Number of names under which an operator is registered: its own, and the same name followed by _2, _3 and so on.
constexpr size_t kNumbers = 9;

enum class Activation { relu, swish, gelu, tanh, hardtanh, selu };
struct DeclaredActivation {
  const char* name;
  float lowest;  // lowest possible output if rows are scaled by their maximum; otherwise 0
};
constexpr DeclaredActivation kActivations[] = {
    {"relu", 0.0f},
    {"swish", 0.2785f},
    {"gelu", 0.17f},
    {"tanh", 0.0f},
    {"hardtanh", 0.0f},
    {"selu", 0.0f}};
constexpr const char* kActivationNames = "relu, swish, gelu, tanh, hardtanh or selu";

// Names of operators.
namespace names {
constexpr const char* kInt8Linear = "Int8Linear";
constexpr const char* kInt8FeedForward = "Int8FeedForward";
constexpr const char* kInt8GatedFeedForward = "Int8GatedFeedForward";
constexpr const char* kInt8MixtureOfExperts = "Int8MixtureOfExperts";
constexpr const char* kInt4Linear = "Int4Linear";
constexpr const char* kInt4FeedForward = "Int4FeedForward";
constexpr const char* kInt4GatedFeedForward = "Int4GatedFeedForward";
constexpr const char* kInt4MixtureOfExperts = "Int4MixtureOfExperts";
constexpr const char* kCachedAttention = "CachedAttention";
constexpr const char* kNextCache = "NextCache";
constexpr const char* kCachedConvolution = "CachedConvolution";
constexpr const char* kNormalization = "Normalization";
constexpr const char* kAddNormalization = "AddNormalization";
constexpr const char* kInt8Rows = "Int8Rows";
constexpr const char* kInt8MatMul = "Int8MatMul";
constexpr const char* kInt8FirstConvolutions = "Int8FirstConvolutions";
constexpr size_t kCount = 16;
}  // namespace names

}  // namespace u2moe
