// Log-mel filter banks and MFCC, with the equations of runtime/model/features.py, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

// Clang's runtime library may lack the detection of AVX2, and on Windows GCC does not align AVX's registers on the stack.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(_WIN32)
#define U2MOE_AVX2
#endif

namespace u2moe::runtime {

/// Constants of a front end, as `Constants` in features.py. Python fills this struct, too.
struct FrontEndConstants {
  std::size_t frame_len, shift_len, num_points, lowest, num_weights, num_bins, num_ceps;
  const double* window;        ///< [frame_len]
  const double* turns;         ///< cosine and sine of 2 pi k / num_points [num_points / 2 + 1, 2]
  const double* weights;       ///< of the rising and the falling band [2, num_weights]
  const double* cepstra;       ///< [num_bins, num_ceps]; null for log-mel energies
  const std::int64_t* starts;  ///< [num_bins + 1]
};

/// Computes features. Frames are computed side by side, each in a lane of its own, so a frame's features do not depend on the
/// frames beside it.
class FeatureFrames {
 public:
  explicit FeatureFrames(const FrontEndConstants& constants)
      : c_(constants), half_(c_.num_points / 2), places_(half_), points_(half_), rising_(c_.num_bins + 1), falling_(c_.num_bins + 1), energies_(c_.num_bins) {
    for (std::size_t i = 0, place = 0; i < half_; ++i) {
      places_[i] = place;  // i with its bits reversed
      std::size_t bit = half_ / 2;
      for (; bit & place; bit /= 2) place ^= bit;
      place |= bit;
    }
  }

  /// Write the features [num_frames, size] of samples in [-1, 1].
  void compute(const float* samples, std::size_t num_frames, float* features) {
#ifdef U2MOE_AVX2
    if (__builtin_cpu_supports("avx2")) return compute_with_avx2(samples, num_frames, features);
#endif
    compute_on_any(samples, num_frames, features);
  }

 private:
  static constexpr std::size_t kLanes = 4;
  static constexpr double kPreemphasis = 0.97;

#ifdef U2MOE_AVX2
  // With all calls inlined, so that an instruction computes all lanes. Results are the same, since AVX2 fuses no operations.
  __attribute__((target("avx2"), flatten)) void compute_with_avx2(const float* samples, std::size_t num_frames, float* features) {
    compute_on_any(samples, num_frames, features);
  }
#endif

  void compute_on_any(const float* samples, std::size_t num_frames, float* features) {
    for (std::size_t start = 0; start < num_frames; start += kLanes) {
      const std::size_t num = std::min(kLanes, num_frames - start);
      load(samples + start * c_.shift_len, num);
      transform();
      add_up();
      for (std::size_t lane = 0; lane < num; ++lane) features = write(lane, features);
    }
  }

  // One number of each frame.
  struct Lanes {
    double of[kLanes];

    template <class Function>
    static Lanes each(Function function) {
      Lanes lanes;
      for (std::size_t lane = 0; lane < kLanes; ++lane) lanes.of[lane] = function(lane);
      return lanes;
    }
    Lanes operator+(const Lanes& other) const {
      return each([&](std::size_t lane) { return of[lane] + other.of[lane]; });
    }
    Lanes operator-(const Lanes& other) const {
      return each([&](std::size_t lane) { return of[lane] - other.of[lane]; });
    }
    Lanes operator*(double factor) const {
      return each([&](std::size_t lane) { return of[lane] * factor; });
    }
    Lanes squared() const {
      return each([&](std::size_t lane) { return of[lane] * of[lane]; });
    }
  };

  struct Complex {
    Lanes real, imag;
  };

  // Remove the mean of each frame, emphasise high frequencies, and apply the window. Samples at even positions become real parts,
  // those at odd ones imaginary parts.
  void load(const float* samples, std::size_t num_frames) {
    const float* first[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) first[lane] = samples + std::min(lane, num_frames - 1) * c_.shift_len;
    const auto at = [&](std::size_t i) { return Lanes::each([&](std::size_t lane) { return static_cast<double>(first[lane][i]); }); };
    Lanes sum{};
    for (std::size_t i = 0; i < c_.frame_len; ++i) sum = sum + at(i);
    const Lanes offset = sum * ((1 - kPreemphasis) / static_cast<double>(c_.frame_len));
    Lanes before{};
    const auto next = [&](std::size_t i) {
      if (i >= c_.frame_len) return Lanes{};
      const Lanes sample = at(i);
      // The first sample also stands for the one before it.
      const Lanes emphasised = i ? sample - before * kPreemphasis : sample * (1 - kPreemphasis);
      before = sample;
      return (emphasised - offset) * c_.window[i];
    };
    for (std::size_t i = 0; i < half_; ++i) {
      const Lanes real = next(2 * i);
      points_[places_[i]] = {real, next(2 * i + 1)};
    }
  }

  // Compute the Fourier transform of `points_`, with decimation in time.
  void transform() {
    for (std::size_t size = 1; size < half_; size *= 2) {
      for (std::size_t k = 0; k < size; ++k) {
        const double* turn = c_.turns + 2 * (c_.num_points / (2 * size)) * k;
        for (std::size_t i = k; i < half_; i += 2 * size) {
          Complex &a = points_[i], &b = points_[i + size];
          const Lanes real = b.real * turn[0] + b.imag * turn[1], imag = b.imag * turn[0] - b.real * turn[1];
          b = {a.real - real, a.imag - imag};
          a = {a.real + real, a.imag + imag};
        }
      }
    }
  }

  // Power at point k of the spectrum of the real samples.
  Lanes power(std::size_t k) const {
    const Complex &a = points_[k % half_], &b = points_[(half_ - k) % half_];
    const double cosine = c_.turns[2 * k], sine = c_.turns[2 * k + 1];
    const Lanes real = (a.real - b.real) * 0.5, imag = (a.imag + b.imag) * 0.5;
    return ((a.real + b.real) * 0.5 + (imag * cosine - real * sine)).squared() +
           ((a.imag - b.imag) * 0.5 - (real * cosine + imag * sine)).squared();
  }

  // Add up the weighted power in each interval, for the band that rises and for the one that falls there.
  void add_up() {
    for (std::size_t i = 0; i <= c_.num_bins; ++i) {
      const std::size_t end = i < c_.num_bins ? static_cast<std::size_t>(c_.starts[i + 1]) : c_.num_weights;
      rising_[i] = falling_[i] = Lanes{};
      for (auto point = static_cast<std::size_t>(c_.starts[i]); point < end; ++point) {
        const Lanes found = power(c_.lowest + point);
        rising_[i] = rising_[i] + found * c_.weights[point];
        falling_[i] = falling_[i] + found * c_.weights[c_.num_weights + point];
      }
    }
  }

  // Write the features of a frame, and return where the next frame begins.
  float* write(std::size_t lane, float* features) {
    for (std::size_t bin = 0; bin < c_.num_bins; ++bin) {
      const double energy = rising_[bin].of[lane] + falling_[bin + 1].of[lane];
      energies_[bin] = std::log(std::max(energy, static_cast<double>(std::numeric_limits<float>::epsilon())));
    }
    if (!c_.cepstra) return std::transform(energies_.begin(), energies_.end(), features, [](double energy) { return static_cast<float>(energy); });
    for (std::size_t i = 0; i < c_.num_ceps; ++i) {
      double sum = 0;
      for (std::size_t bin = 0; bin < c_.num_bins; ++bin) sum += energies_[bin] * c_.cepstra[bin * c_.num_ceps + i];
      *features++ = static_cast<float>(sum);
    }
    return features;
  }

  const FrontEndConstants& c_;
  const std::size_t half_;
  std::vector<std::size_t> places_;
  std::vector<Complex> points_;
  std::vector<Lanes> rising_, falling_;
  std::vector<double> energies_;
};

/// A front end that owns its constants, which it derives as `constants_of` in features.py does.
class FrontEnd {
 public:
  /// @param window "povey", "hamming", "hanning", "blackman" or "rectangular".
  /// @param low_hz, top_hz edges of the mel bands.
  FrontEnd(int sample_rate, int frame_len, int shift_len, int num_bins, int num_ceps, const std::string& window, double low_hz, double top_hz) {
    c_.frame_len = static_cast<std::size_t>(frame_len);
    c_.shift_len = static_cast<std::size_t>(shift_len);
    c_.num_bins = static_cast<std::size_t>(num_bins);
    c_.num_ceps = static_cast<std::size_t>(num_ceps);
    for (c_.num_points = 1; c_.num_points < c_.frame_len;) c_.num_points *= 2;
    for (int place = 0; place < frame_len; ++place) window_.push_back(shape(window, 2 * kPi * place / (frame_len - 1)) * kScale);
    for (std::size_t k = 0; k <= c_.num_points / 2; ++k) {
      const double angle = 2 * kPi * static_cast<double>(k) / static_cast<double>(c_.num_points);
      turns_.insert(turns_.end(), {std::cos(angle), std::sin(angle)});
    }
    set_bands(sample_rate, mel(low_hz), mel(top_hz));
    for (int bin = 0; num_ceps && bin < num_bins; ++bin) {
      for (int i = 0; i < num_ceps; ++i) {
        const double scale = std::sqrt((i ? 2.0 : 1.0) / num_bins), lifter = 1 + 0.5 * kLifter * std::sin(kPi * i / kLifter);
        cepstra_.push_back(scale * lifter * std::cos(kPi / num_bins * (bin + 0.5) * i));
      }
    }
    c_.window = window_.data();
    c_.turns = turns_.data();
    c_.weights = weights_.data();
    c_.cepstra = num_ceps ? cepstra_.data() : nullptr;
    c_.starts = starts_.data();
  }
  FrontEnd(const FrontEnd&) = delete;
  FrontEnd& operator=(const FrontEnd&) = delete;

  static bool knows(const std::string& window) {
    return window == "povey" || window == "hamming" || window == "hanning" || window == "blackman" || window == "rectangular";
  }

  /// Whether features can be computed: no mel band lacks points of the spectrum.
  bool is_possible() const { return is_possible_; }

  /// Compute the features [frames, size] of all complete frames in the samples.
  std::vector<float> features(const std::vector<float>& samples) const {
    const std::size_t num = samples.size() < c_.frame_len ? 0 : 1 + (samples.size() - c_.frame_len) / c_.shift_len;
    std::vector<float> found(num * (c_.num_ceps ? c_.num_ceps : c_.num_bins));
    FeatureFrames(c_).compute(samples.data(), num, found.data());
    return found;
  }

 private:
  static constexpr double kPi = 3.14159265358979323846, kScale = 32768, kLifter = 22;

  static double mel(double frequency) { return 1127 * std::log(1 + frequency / 700); }

  static double shape(const std::string& window, double turn) {
    if (window == "povey") return std::pow(0.5 - 0.5 * std::cos(turn), 0.85);
    if (window == "hamming") return 0.54 - 0.46 * std::cos(turn);
    if (window == "hanning") return 0.5 - 0.5 * std::cos(turn);
    return window == "blackman" ? 0.42 - 0.5 * std::cos(turn) + 0.08 * std::cos(2 * turn) : 1;
  }

  void set_bands(int sample_rate, double lowest, double highest) {
    const auto num_intervals = static_cast<double>(c_.num_bins + 1);
    const double width = (highest - lowest) / num_intervals;
    std::vector<double> places;
    for (std::size_t point = 0; point < c_.num_points / 2; ++point) {
      places.push_back((mel(static_cast<double>(point) * sample_rate / static_cast<double>(c_.num_points)) - lowest) / width);
    }
    const auto at = [&places](double place) { return std::lower_bound(places.begin(), places.end(), place); };
    c_.lowest = static_cast<std::size_t>(at(0) - places.begin());
    places = {at(0), at(num_intervals)};
    places.push_back(num_intervals);
    c_.num_weights = places.size();
    for (std::size_t i = 0; i <= c_.num_bins; ++i) starts_.push_back(at(static_cast<double>(i)) - places.begin());
    const auto is_empty = [this](std::size_t i) {
      return starts_[i] == (i < c_.num_bins ? starts_[i + 1] : static_cast<std::int64_t>(c_.num_weights) - 1);
    };
    for (std::size_t i = 0; i < c_.num_bins; ++i) is_possible_ = is_possible_ && !(is_empty(i) && is_empty(i + 1));
    places.pop_back();
    for (double place : places) weights_.push_back(place - std::floor(place));
    weights_.push_back(0);
    for (std::size_t i = 0; i + 1 < c_.num_weights; ++i) weights_.push_back(1 - weights_[i]);
    weights_.push_back(0);
  }

  FrontEndConstants c_{};
  bool is_possible_ = true;
  std::vector<double> window_, turns_, weights_, cepstra_;
  std::vector<std::int64_t> starts_;
};

}  // namespace u2moe::runtime
