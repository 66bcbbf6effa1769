// The C++ runtime's features for Python.
#include <exception>

#include "exported.h"
#include "front_end.hpp"

/// Computes the features [num_frames, size] of samples in [-1, 1]. Returns 0 if there is not enough memory, else 1.
U2MOE_EXPORT int u2moe_features(const u2moe::runtime::FrontEndConstants* constants, const float* samples, size_t num_frames, float* features) {
  try {
    u2moe::runtime::FeatureFrames(*constants).compute(samples, num_frames, features);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}
