// Log-mel filter banks and MFCC for Python: the equations of runtime/model/features.py, in double precision. Frames are
// computed side by side, each in a lane of its own, so a frame's features do not depend on the frames beside it.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "exported.h"

namespace {

constexpr size_t kLanes = 4;
constexpr double kPreemphasis = 0.97;

// One number of each frame.
struct Lanes {
  double of[kLanes];
};

template <class Function>
inline Lanes each(Function function) {
  Lanes lanes;
  for (size_t lane = 0; lane < kLanes; ++lane) lanes.of[lane] = function(lane);
  return lanes;
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return each([&](size_t lane) { return a.of[lane] + b.of[lane]; });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return each([&](size_t lane) { return a.of[lane] - b.of[lane]; });
}
inline Lanes operator*(const Lanes& a, double factor) {
  return each([&](size_t lane) { return a.of[lane] * factor; });
}
inline Lanes squared(const Lanes& a) {
  return each([&](size_t lane) { return a.of[lane] * a.of[lane]; });
}

struct Complex {
  Lanes real, imag;
};

}  // namespace

/// `Constants` of runtime/model/features.py. `turns` holds the cosine and sine of 2 pi k / num_points for k up to
/// num_points / 2. `cepstra` is null for log-mel energies.
struct U2moeFrontEnd {
  size_t frame_len, shift_len, num_points, lowest, num_weights, num_bins, num_ceps;
  const double *window, *turns, *weights, *cepstra;
  const int64_t* starts;
};

namespace {

class FrontEnd {
 public:
  explicit FrontEnd(const U2moeFrontEnd& given)
      : c_(given), half_(given.num_points / 2), places_(half_), points_(half_), rising_(given.num_bins + 1), falling_(given.num_bins + 1) {
    for (size_t i = 0, place = 0; i < half_; ++i) {
      places_[i] = place;  // i with its bits reversed
      size_t bit = half_ >> 1;
      for (; bit & place; bit >>= 1) place ^= bit;
      place |= bit;
    }
  }

  // Writes the features of the first `num_frames` frames, at most kLanes.
  void compute(const float* samples, size_t num_frames, float* features) {
    load(samples, num_frames);
    transform();
    add_up();
    std::vector<double>& energies = energies_;
    energies.resize(c_.num_bins);
    for (size_t lane = 0; lane < num_frames; ++lane) {
      for (size_t bin = 0; bin < c_.num_bins; ++bin) {
        const double energy = rising_[bin].of[lane] + falling_[bin + 1].of[lane];
        energies[bin] = std::log(std::max(energy, static_cast<double>(std::numeric_limits<float>::epsilon())));
      }
      features = c_.cepstra ? transformed(features) : std::transform(energies.begin(), energies.end(), features, to_float);
    }
  }

 private:
  static float to_float(double number) { return static_cast<float>(number); }

  // Removes the mean of each frame, emphasises high frequencies, and applies the window. The frame becomes complex numbers:
  // real parts are samples at even positions, imaginary parts those at odd ones.
  void load(const float* samples, size_t num_frames) {
    const float* first[kLanes];
    for (size_t lane = 0; lane < kLanes; ++lane) first[lane] = samples + std::min(lane, num_frames - 1) * c_.shift_len;
    const auto at = [&](size_t i) { return each([&](size_t lane) { return static_cast<double>(first[lane][i]); }); };
    Lanes sum{};
    for (size_t i = 0; i < c_.frame_len; ++i) sum = sum + at(i);
    const Lanes offset = sum * ((1 - kPreemphasis) / static_cast<double>(c_.frame_len));
    Lanes before = at(0);
    const auto next = [&](size_t i) {
      if (i >= c_.frame_len) return Lanes{};
      const Lanes sample = at(i);
      // The first sample also stands for the one before it.
      const Lanes emphasised = i ? sample - before * kPreemphasis : sample * (1 - kPreemphasis);
      before = sample;
      return (emphasised - offset) * c_.window[i];
    };
    for (size_t i = 0; i < half_; ++i) {
      const Lanes real = next(2 * i);
      points_[places_[i]] = {real, next(2 * i + 1)};
    }
  }

  // Fourier transform of `points_`, decimation in time.
  void transform() {
    for (size_t size = 1; size < half_; size *= 2) {
      for (size_t k = 0; k < size; ++k) {
        const double* turn = c_.turns + 2 * (c_.num_points / (2 * size)) * k;
        for (size_t i = k; i < half_; i += 2 * size) {
          Complex &a = points_[i], &b = points_[i + size];
          const Lanes real = b.real * turn[0] + b.imag * turn[1], imag = b.imag * turn[0] - b.real * turn[1];
          b = {a.real - real, a.imag - imag};
          a = {a.real + real, a.imag + imag};
        }
      }
    }
  }

  // Power of a point of the spectrum of the real samples.
  Lanes power(size_t k) const {
    const Complex &a = points_[k % half_], &b = points_[(half_ - k) % half_];
    const double cosine = c_.turns[2 * k], sine = c_.turns[2 * k + 1];
    const Lanes real = (a.real - b.real) * 0.5, imag = (a.imag + b.imag) * 0.5;
    return squared((a.real + b.real) * 0.5 + (imag * cosine - real * sine)) +
           squared((a.imag - b.imag) * 0.5 - (real * cosine + imag * sine));
  }

  // Adds up the weighted power in each interval, for the band that rises and for the one that falls there.
  void add_up() {
    for (size_t i = 0; i <= c_.num_bins; ++i) {
      const size_t end = i < c_.num_bins ? static_cast<size_t>(c_.starts[i + 1]) : c_.num_weights;
      Lanes rising{}, falling{};
      for (size_t point = static_cast<size_t>(c_.starts[i]); point < end; ++point) {
        const Lanes found = power(c_.lowest + point);
        rising = rising + found * c_.weights[point];
        falling = falling + found * c_.weights[c_.num_weights + point];
      }
      rising_[i] = rising;
      falling_[i] = falling;
    }
  }

  // Writes the cepstra of `energies_`, and returns the end of what was written.
  float* transformed(float* features) const {
    for (size_t i = 0; i < c_.num_ceps; ++i) {
      double sum = 0;
      for (size_t bin = 0; bin < c_.num_bins; ++bin) sum += energies_[bin] * c_.cepstra[bin * c_.num_ceps + i];
      *features++ = to_float(sum);
    }
    return features;
  }

  const U2moeFrontEnd& c_;
  const size_t half_;
  std::vector<size_t> places_;
  std::vector<Complex> points_;
  std::vector<Lanes> rising_, falling_;
  std::vector<double> energies_;
};

}  // namespace

/// Computes the features [num_frames, size] of samples in [-1, 1]. Returns 0 if there is not enough memory, else 1.
U2MOE_EXPORT int u2moe_features(const U2moeFrontEnd* constants, const float* samples, size_t num_frames, float* features) {
  try {
    FrontEnd front_end(*constants);
    const size_t size = constants->cepstra ? constants->num_ceps : constants->num_bins;
    for (size_t start = 0; start < num_frames; start += kLanes)
      front_end.compute(samples + start * constants->shift_len, std::min(kLanes, num_frames - start), features + start * size);
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
