// Adds silence around sources that begin or end in the middle of a sound; see runtime/audio/padding.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "manifest.hpp"

namespace u2moe::runtime {

/// A feature frame is a sound if its samples span more than this.
constexpr double kSound = 1.0 / 256;

/// Adds silence before and after one source; any split of its samples gives the same.
class Padding {
 public:
  Padding(double padding_s, const Manifest& manifest)
      : num_silence_(static_cast<std::size_t>(std::floor(padding_s * manifest.sample_rate + 0.5))),
        frame_len_(static_cast<std::size_t>(manifest.frame_len())) {}

  /// Takes samples and returns those to recognise: none until they fill a feature frame.
  std::vector<float> accept(std::vector<float> samples) {
    if (!num_silence_) return samples;
    edge_.insert(edge_.end(), samples.begin(), samples.end());
    if (!has_begun_) return edge_.size() < frame_len_ ? std::vector<float>() : begin();
    keep_last();
    return samples;
  }

  /// Ends the source and returns the last samples to recognise.
  std::vector<float> finish() {
    std::vector<float> rest;
    if (!has_begun_) rest = begin();
    if (is_sound(edge_.begin(), edge_.end())) rest.resize(rest.size() + num_silence_);
    return rest;
  }

  /// Samples of silence that came before the source.
  std::size_t num_before() const { return num_before_; }

 private:
  using Place = std::vector<float>::const_iterator;

  static bool is_sound(Place first, Place last) {
    if (first == last) return false;
    const auto [least, most] = std::minmax_element(first, last);
    return static_cast<double>(*most) - static_cast<double>(*least) > kSound;
  }

  std::vector<float> begin() {
    has_begun_ = true;
    const auto num = static_cast<std::ptrdiff_t>(std::min(edge_.size(), frame_len_));
    if (is_sound(edge_.begin(), edge_.begin() + num)) num_before_ = num_silence_;
    std::vector<float> heard(num_before_);
    heard.insert(heard.end(), edge_.begin(), edge_.end());
    keep_last();
    return heard;
  }

  void keep_last() {
    if (edge_.size() > frame_len_) edge_.erase(edge_.begin(), edge_.end() - static_cast<std::ptrdiff_t>(frame_len_));
  }

  std::size_t num_silence_, frame_len_, num_before_ = 0;
  bool has_begun_ = false;
  std::vector<float> edge_;  // all samples until it has begun, then the last ones
};

}  // namespace u2moe::runtime
