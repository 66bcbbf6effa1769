// The input of one stream: samples at any rate to windows of features, and their loudness.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "graphs.hpp"
#include "padding.hpp"
#include "pauses.hpp"
#include "resampler.hpp"

namespace u2moe {

constexpr float kLoudest = 8;  // samples may exceed 1 after resampling or decoding, but beyond this they are unscaled integers

/// Windows begin every `chunk_size` encoder frames; the last may be shorter.
class Reception {
 public:
  Reception(const Graphs& graphs, const Manifest& manifest, int chunk_size, double padding_s)
      : graphs_(&graphs), m_(&manifest), padding_(padding_s, manifest) {
    const auto rate = static_cast<std::size_t>(manifest.subsampling_rate);
    stride_ = static_cast<std::size_t>(chunk_size) * rate;
    shortest_ = static_cast<std::size_t>(manifest.right_context) + 1;
    length_ = stride_ - rate + shortest_;
  }

  /// Checks samples of one channel before any is appended. The first rate applies to the whole stream.
  /// @throws AudioError the rate is out of range or has changed, or samples are not finite or far outside [-1, 1].
  void check(int sample_rate, const float* samples, std::size_t num) {
    if (resampler_ && sample_rate != resampler_->source_rate()) {
      throw AudioError("sample rate changed from " + std::to_string(resampler_->source_rate()) + " to " +
                       std::to_string(sample_rate) + " Hz in a stream");
    }
    if (!std::all_of(samples, samples + num, [](float sample) { return std::isfinite(sample); })) {
      throw AudioError("samples hold values that are no finite numbers");
    }
    if (!std::all_of(samples, samples + num, [](float sample) { return std::fabs(sample) <= kLoudest; })) {
      throw AudioError("samples are far outside [-1, 1]: divide integers by the largest first");
    }
    if (!resampler_) resampler_.emplace(sample_rate, m_->sample_rate);
  }

  /// Appends checked samples. Take all windows before appending more: taking one moves all samples that wait.
  void accept(const float* samples, std::size_t num) { append(resampler_->accept(samples, num)); }

  /// Finish the input, so that the last window may be short.
  void finish() {
    if (resampler_) append(resampler_->finish());
    hear(padding_.finish());
    is_finished_ = true;
  }

  bool is_finished() const { return is_finished_; }

  /// Seconds of silence added before the source, in whole milliseconds like the times of results.
  double lead_s() const {
    const auto rate = static_cast<std::size_t>(m_->sample_rate);
    return static_cast<double>((padding_.num_before() * 1000 + rate / 2) / rate) / 1000;
  }
  /// Seconds of the source so far, rounded down to whole milliseconds.
  double end_s() const { return static_cast<double>(num_received_ * 1000 / static_cast<std::size_t>(m_->sample_rate)) / 1000; }

  bool has_window() const { return num_frames() >= num_taken_ * stride_ + (is_finished_ ? shortest_ : length_); }

  /// The next window [frames, mel]. Features are computed for the frames that a window adds, so that how the samples arrived
  /// makes no difference, not even in the last bit.
  Floats take_window() {
    const auto bins = static_cast<std::size_t>(m_->feature_size);
    const std::size_t begin = num_taken_ * stride_, end = std::min(begin + length_, num_frames());
    if (end > num_computed_) compute(end);
    const auto place = [&](std::size_t frame) { return features_.begin() + static_cast<std::ptrdiff_t>((frame - first_frame_) * bins); };
    const Floats window(place(begin), place(end));
    const std::size_t next = std::min(begin + stride_, num_computed_);
    features_.erase(features_.begin(), place(next));
    first_frame_ = next;
    ++num_taken_;
    return window;
  }

  /// Loudness of the first `num` feature frames since `forget`.
  std::vector<float> levels(std::size_t num) const {
    return {levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(std::min(levels_.size(), num))};
  }

  /// Forget the loudness before encoder frame `start`.
  void forget(std::size_t start) {
    const std::size_t first = start * static_cast<std::size_t>(m_->subsampling_rate);
    levels_.erase(levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(std::min(first - levels_start_, levels_.size())));
    levels_start_ = first;
  }

 private:
  void append(Floats samples) {
    num_received_ += samples.size();
    hear(padding_.accept(std::move(samples)));
  }

  void hear(const Floats& samples) { samples_.insert(samples_.end(), samples.begin(), samples.end()); }

  // Feature frames of all samples so far.
  std::size_t num_frames() const {
    const std::size_t num = first_sample_ + samples_.size();
    const auto frame = static_cast<std::size_t>(m_->frame_len()), shift = static_cast<std::size_t>(m_->shift_len());
    return num < frame ? 0 : 1 + (num - frame) / shift;
  }

  // Compute the features up to frame `end`, and forget the samples that no later frame needs.
  void compute(std::size_t end) {
    const auto shift = static_cast<std::size_t>(m_->shift_len());
    const auto first = samples_.begin() + static_cast<std::ptrdiff_t>(num_computed_ * shift - first_sample_);
    const std::size_t num = (end - 1 - num_computed_) * shift + static_cast<std::size_t>(m_->frame_len());
    const Floats added = graphs_->features(Floats(first, first + static_cast<std::ptrdiff_t>(num)));
    features_.insert(features_.end(), added.begin(), added.end());
    const std::vector<float> measured = loudness(added, static_cast<std::size_t>(m_->feature_size));
    levels_.insert(levels_.end(), measured.begin(), measured.end());
    num_computed_ = end;
    const std::size_t used = std::min(end * shift - first_sample_, samples_.size());
    samples_.erase(samples_.begin(), samples_.begin() + static_cast<std::ptrdiff_t>(used));
    first_sample_ += used;
  }

  const Graphs* graphs_;
  const Manifest* m_;
  std::size_t stride_, shortest_, length_;  // feature frames
  Padding padding_;
  std::size_t num_received_ = 0;
  std::optional<Resampler> resampler_;
  bool is_finished_ = false;
  Floats samples_, features_;  // from first_sample_ and first_frame_ on
  std::size_t first_sample_ = 0, first_frame_ = 0, num_computed_ = 0, num_taken_ = 0;
  std::vector<float> levels_;  // from feature frame levels_start_ on
  std::size_t levels_start_ = 0;
};

}  // namespace u2moe
