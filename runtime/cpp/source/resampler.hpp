// A band-limited resampler: that of the Python runtime for systems without soxr (runtime/audio/resampling.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

namespace u2moe::runtime {

/// Resamples one channel as it comes; n samples become round(n * target_rate / source_rate). A windowed sinc is evaluated at
/// the time of each new sample, as one sum of the same products in the same order however the samples arrive: any split gives
/// the same samples, to the last bit.
class Resampler {
 public:
  /// @param source_rate, target_rate in Hz.
  /// @throws AudioError `source_rate` is not from 1000 to 384000.
  Resampler(int source_rate, int target_rate);

  int source_rate() const { return source_rate_; }

  /// Resamples what is complete; samples near the end are held back until more come, or until `finish`.
  std::vector<float> accept(const float* samples, std::size_t num);

  /// The samples that were held back.
  std::vector<float> finish();

 private:
  bool is_identity() const { return numerator_ == denominator_; }

  std::vector<float> taken(std::int64_t total);
  const std::vector<float>& filter(std::int64_t phase);

  int source_rate_;
  std::int64_t numerator_, denominator_;  // source samples per target sample
  double cutoff_;
  std::int64_t reach_;  // source samples on either side of a new one
  std::vector<float> kept_;
  std::int64_t first_;  // index of the first kept sample
  std::int64_t num_received_ = 0, num_returned_ = 0;
  std::map<std::int64_t, std::vector<float>> filters_;  // by phase
};

/// Checks samples of one channel at the rate of a stream, which is that of its first ones: then a resampler is made.
/// @throws AudioError the rate is out of range or has changed, or samples are not finite or far outside [-1, 1].
void check_audio(std::optional<Resampler>& resampler, int sample_rate, int target_rate, const float* samples, std::size_t num);

}  // namespace u2moe::runtime
