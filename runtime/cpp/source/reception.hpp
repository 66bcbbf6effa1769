// The input of one stream: samples at any rate to windows of features, and their loudness.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "manifest.hpp"
#include "padding.hpp"
#include "resampler.hpp"

namespace u2moe::runtime {

/// Windows begin every `chunk_size` encoder frames unless the last one is shortened or repeated; the last may be shorter.
class Reception {
 public:
  /// @param knows_last a full window waits for another after it, or for the end, so that it is known whether it is the last.
  Reception(const Manifest& manifest, int chunk_size, bool knows_last, double padding_s);

  /// Checks samples of one channel before any is appended. The first rate applies to the whole stream.
  /// @throws AudioError see `check_audio`.
  void check(int sample_rate, const float* samples, std::size_t num) { check_audio(resampler_, sample_rate, m_->sample_rate, samples, num); }

  /// Appends checked samples. Take all windows before appending more: taking one moves all samples that wait.
  void accept(const float* samples, std::size_t num) { append(resampler_->accept(samples, num)); }

  /// Finish the input, so that the last window may be short.
  void finish();

  bool is_finished() const { return is_finished_; }

  /// Seconds of silence added before the source, in whole milliseconds like the times of results.
  double lead_s() const;
  /// Seconds of the source so far, rounded down to whole milliseconds.
  double end_s() const;

  bool has_window() const;
  bool is_exhausted() const { return is_finished_ && !has_window(); }

  /// Begin the next window. Returns the samples of the frames that it adds, perhaps none: how the samples arrived makes no
  /// difference for their features, not even in the last bit.
  Floats take_window();
  /// Add the features of these samples.
  void add_features(const Floats& added);
  /// Features [frames, mel] of the last window.
  Floats window() const;
  /// Encoder frames of the last window.
  std::size_t num_window_frames() const;
  bool window_is_full() const { return end_ - begin_ >= length_; }
  /// End the last window after `num` encoder frames: the next one begins with the rest of it.
  void shorten_window(std::size_t num);
  /// Make the next window begin with the last `num` encoder frames of this one.
  void repeat_window(std::size_t num);

  /// Loudness of the feature frames of the last window.
  std::vector<float> window_levels() const { return levels(end_ - begin_); }
  /// Loudness of the first `num` feature frames since `forget`.
  std::vector<float> levels(std::size_t num) const;
  /// Forget the loudness before encoder frame `start`.
  void forget(std::size_t start);

 private:
  void append(Floats samples);
  void hear(const Floats& samples) { samples_.insert(samples_.end(), samples.begin(), samples.end()); }
  std::size_t num_frames() const;
  void trim();

  const Manifest* m_;
  std::size_t rate_, stride_, shortest_, length_, needed_;  // feature frames
  Padding padding_;
  std::size_t num_received_ = 0;
  std::optional<Resampler> resampler_;
  bool is_finished_ = false;
  Floats samples_, features_;  // from first_sample_ and first_feature_ on
  std::size_t first_sample_ = 0, first_feature_ = 0, num_computed_ = 0;
  std::size_t begin_ = 0, end_ = 0, next_ = 0;  // feature frames of the last window, and the first of the next
  std::vector<float> levels_;                   // from feature frame levels_start_ on
  std::size_t levels_start_ = 0;
};

}  // namespace u2moe::runtime
