// Band-limited resampler. The Python runtime uses the same algorithm on systems without soxr (runtime/audio/arrays.py).
#pragma once

#include "errors.hpp"

namespace u2moe::runtime {

/// @throws AudioError if a sample rate is out of range.
inline void check_rate(int rate) {
  if (rate < 1000 || rate > 384000) fail<AudioError>("sample rate must be between 1000 and 384000 Hz, got " + std::to_string(rate));
}

/// Resamples one channel. In total, n samples become round(n * target_rate / source_rate): sums of source samples weighted by a
/// windowed sinc, always added in the same order. Any split into buffers gives the same samples, to the last bit.
class Resampler {
 public:
  /// @param source_rate, target_rate in Hz.
  /// @throws AudioError if a rate is not between 1000 and 384000.
  Resampler(int source_rate, int target_rate) : source_rate_(source_rate) {
    check_rate(source_rate);
    check_rate(target_rate);
    const int divisor = std::gcd(source_rate, target_rate);
    numerator_ = source_rate / divisor;
    denominator_ = target_rate / divisor;
    cutoff_ = std::min(1.0, static_cast<double>(denominator_) / static_cast<double>(numerator_)) * kRollOff;
    reach_ = static_cast<std::int64_t>(std::ceil(kNumCrossings / cutoff_));
    kept_.assign(static_cast<std::size_t>(reach_), 0.0F);  // silence before the first sample
    first_ = -reach_;
  }

  int source_rate() const { return source_rate_; }

  /// Append samples, and return the resampled ones. Samples near the end wait until more arrive or `finish` is called.
  std::vector<float> accept(const float* samples, std::size_t num) {
    if (is_identity()) return {samples, samples + num};
    num_received_ += static_cast<std::int64_t>(num);
    kept_.insert(kept_.end(), samples, samples + num);
    return taken((num_received_ - reach_) * denominator_ / numerator_);
  }

  /// End the input and return the last resampled samples.
  std::vector<float> finish() {
    if (is_identity()) return {};
    kept_.insert(kept_.end(), static_cast<std::size_t>(2 * reach_), 0.0F);
    return taken((2 * num_received_ * denominator_ + numerator_) / (2 * numerator_));
  }

 private:
  static constexpr double kNumCrossings = 32;  // zero crossings of the sinc on either side
  static constexpr double kRollOff = 0.945;    // share of the band that passes; the rest is the transition band
  static constexpr double kKaiserBeta = 9;
  static constexpr double kPi = 3.14159265358979323846;

  // Modified Bessel function of the first kind of order 0, by its series.
  static double bessel(double x) {
    double sum = 1, term = 1;
    for (int k = 1; term > sum * 1e-18; ++k) {
      term *= x / 2 / k * (x / 2 / k);
      sum += term;
    }
    return sum;
  }

  // Sum in the same order as numpy: eight sums in parallel, which are then added in pairs. The number of taps is even.
  static float sum_of_products(const float* samples, const float* factors, std::size_t num) {
    if (num > 128) {
      const std::size_t half = num / 2 - num / 2 % 8;
      return sum_of_products(samples, factors, half) + sum_of_products(samples + half, factors + half, num - half);
    }
    float sums[8];
    for (std::size_t i = 0; i < 8; ++i) sums[i] = samples[i] * factors[i];
    std::size_t i = 8;
    for (; i + 8 <= num; i += 8) {
      for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += samples[i + lane] * factors[i + lane];
    }
    float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < num; ++i) sum += samples[i] * factors[i];
    return sum;
  }

  bool is_identity() const { return numerator_ == denominator_; }

  std::vector<float> taken(std::int64_t total) {
    std::vector<float> found;
    for (; num_returned_ < total; ++num_returned_) {
      const std::int64_t place = num_returned_ * numerator_;
      const auto begin = static_cast<std::size_t>(place / denominator_ - reach_ + 1 - first_);
      const std::vector<float>& factors = filter(place % denominator_);
      found.push_back(sum_of_products(kept_.data() + begin, factors.data(), factors.size()));
    }
    const std::int64_t following = num_returned_ * numerator_ / denominator_ - reach_ + 1;
    const std::int64_t forgotten = std::clamp<std::int64_t>(following - first_, 0, static_cast<std::int64_t>(kept_.size()));
    kept_.erase(kept_.begin(), kept_.begin() + forgotten);
    first_ += forgotten;
    return found;
  }

  // Return the factors [taps] for a new sample that lies `phase / denominator_` of the way between two source samples.
  const std::vector<float>& filter(std::int64_t phase) {
    std::vector<float>& factors = filters_[phase];
    if (!factors.empty()) return factors;
    for (std::int64_t tap = 1 - reach_; tap <= reach_; ++tap) {
      const double distance = static_cast<double>(tap) - static_cast<double>(phase) / static_cast<double>(denominator_);
      const double share = std::clamp(distance / static_cast<double>(reach_), -1.0, 1.0);
      const double window = bessel(kKaiserBeta * std::sqrt(1 - share * share)) / bessel(kKaiserBeta);
      const double angle = kPi * cutoff_ * distance, sinc = angle == 0 ? 1 : std::sin(angle) / angle;
      factors.push_back(static_cast<float>(cutoff_ * sinc * window));
    }
    return factors;
  }

  int source_rate_;
  std::int64_t numerator_, denominator_;  // source samples per target sample
  double cutoff_;
  std::int64_t reach_;  // source samples on either side of a new one
  std::vector<float> kept_;
  std::int64_t first_;  // index of the first kept sample
  std::int64_t num_received_ = 0, num_returned_ = 0;
  std::map<std::int64_t, std::vector<float>> filters_;  // by phase
};

/// Check samples of one channel.
/// @param known_rate rate of earlier samples; 0: none.
/// @throws AudioError if the rate is out of range or has changed, or if samples are not finite or are far outside [-1, 1].
inline void check_audio(int known_rate, int sample_rate, const float* samples, std::size_t num) {
  constexpr float loudest = 8;  // resampled or decoded audio may exceed 1; above this limit, samples must be unscaled integers
  std::int32_t most_bits = 0, bits;  // magnitudes are in the order of their bits; NaN and infinity come last
  for (std::size_t i = 0; i < num; ++i) {
    std::memcpy(&bits, samples + i, sizeof bits);
    most_bits = std::max(most_bits, bits & 0x7fffffff);
  }
  float most;
  std::memcpy(&most, &most_bits, sizeof most);
  if (known_rate && sample_rate != known_rate) {
    fail<AudioError>("sample rate changed from " + std::to_string(known_rate) + " to " + std::to_string(sample_rate) + " Hz in a stream");
  }
  if (!std::isfinite(most)) fail<AudioError>("samples contain NaN or infinity");
  if (most > loudest) fail<AudioError>("samples are far outside [-1, 1]: divide integers by their full scale");
  check_rate(sample_rate);
}

}  // namespace u2moe::runtime
