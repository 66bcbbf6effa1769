// Turns samples at the model's rate into windows of features, and measures the loudness of the windows. Adds silence where a
// source begins or ends within a sound (see runtime/audio/padding.py).
#pragma once

#include "manifest.hpp"

namespace u2moe::runtime {

/// Adds silence before a source that begins within a sound, and after one that ends so. Any split into calls gives the same.
class Padding {
 public:
  Padding(double padding_s, const Manifest& manifest)
      : num_silence_(static_cast<std::size_t>(std::floor(padding_s * manifest.sample_rate + 0.5))),
        frame_len_(static_cast<std::size_t>(manifest.frame_len())) {}

  /// Add samples, and return the samples to recognise. With padding, none are returned until the first feature frame is full.
  std::vector<float> accept(std::vector<float> samples) {
    if (!num_silence_) return samples;
    edge_.insert(edge_.end(), samples.begin(), samples.end());
    if (!has_begun_) return edge_.size() < frame_len_ ? std::vector<float>() : begin();
    keep_last();
    return samples;
  }

  /// End the source and return the last samples to recognise.
  std::vector<float> finish() {
    std::vector<float> rest;
    if (!has_begun_) rest = begin();
    if (is_sound(edge_.begin(), edge_.end())) rest.resize(rest.size() + num_silence_);
    return rest;
  }

  std::size_t num_before() const { return num_before_; }  ///< number of samples of silence added before the source

 private:
  using Position = std::vector<float>::const_iterator;

  // Whether the largest sample exceeds the smallest enough to be part of a sound.
  static bool is_sound(Position first, Position last) {
    const auto [least, most] = std::minmax_element(first, last);
    return first != last && static_cast<double>(*most) - static_cast<double>(*least) > 1.0 / 256;
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
  std::vector<float> edge_;  // all samples until the first frame is full, later those of the last frame
};

/// Loudness of each frame of features [frames, feature_size] as a log energy; for MFCC features, the mean of the log energies.
inline std::vector<float> loudness(const std::vector<float>& features, const Manifest& m) {
  const auto num_bins = static_cast<std::size_t>(m.num_mel_bins), size = static_cast<std::size_t>(m.feature_size);
  std::vector<float> levels(features.size() / size);
  for (std::size_t frame = 0; frame < levels.size(); ++frame) {
    if (m.num_ceps > 0) {
      levels[frame] = features[frame * size] / std::sqrt(static_cast<float>(num_bins));
      continue;
    }
    double sum = 0;
    for (std::size_t bin = 0; bin < num_bins; ++bin) sum += std::exp(0.25 * static_cast<double>(features[frame * num_bins + bin]));
    levels[frame] = static_cast<float>(std::log(sum / static_cast<double>(num_bins)) / 0.25);
  }
  return levels;
}

/// Cuts features into windows. A window begins `chunk_size` encoder frames after the previous one, unless `shorten_window` or
/// `repeat_window` was called. The last window may be shorter.
class FeatureExtractor {
 public:
  /// @param knows_last whether a full window is withheld until it is known whether the window is the last.
  FeatureExtractor(const Manifest& manifest, int chunk_size, bool knows_last, double padding_s)
      : m_(&manifest), rate_(static_cast<std::size_t>(manifest.subsampling_rate)),
        stride_(static_cast<std::size_t>(chunk_size) * rate_),
        shortest_(static_cast<std::size_t>(manifest.right_context) + 1),
        length_(stride_ - rate_ / static_cast<std::size_t>(manifest.frame_reduction) + shortest_),
        needed_(knows_last ? stride_ + shortest_ : length_), padding_(padding_s, manifest) {}

  /// Append samples. Take all windows before the next call: taking a window moves all waiting samples in memory.
  void accept(Floats samples) {
    num_received_ += samples.size();
    hear(padding_.accept(std::move(samples)));
  }

  /// Finish the input. The last window may be short.
  void finish() {
    hear(padding_.finish());
    is_finished_ = true;
  }

  bool is_finished() const { return is_finished_; }

  /// Seconds of silence added before the source, rounded to milliseconds like the times of results.
  double lead_s() const {
    const auto rate = static_cast<std::size_t>(m_->sample_rate);
    return static_cast<double>((padding_.num_before() * 1000 + rate / 2) / rate) / 1000;
  }

  /// Seconds of the source so far, rounded down to whole milliseconds.
  double end_s() const { return static_cast<double>(num_received_ * 1000 / static_cast<std::size_t>(m_->sample_rate)) / 1000; }

  bool has_window() const { return num_frames() >= next_ + (is_finished_ ? shortest_ : needed_); }

  bool is_exhausted() const { return is_finished_ && !has_window(); }

  /// Begin the next window. Its features are bit-identical, however the audio is split across calls of `accept`.
  void take_window() {
    const std::size_t end = std::min(next_ + length_, num_frames());
    begin_ = next_;
    end_ = end;
    next_ = begin_ + stride_;
    trim();
    if (end <= num_computed_) return;
    const auto shift = static_cast<std::size_t>(m_->shift_len());
    const auto first = samples_.begin() + static_cast<std::ptrdiff_t>(num_computed_ * shift - first_sample_);
    const std::size_t num = (end - 1 - num_computed_) * shift + static_cast<std::size_t>(m_->frame_len());
    const Floats added = m_->front_end->features({first, first + static_cast<std::ptrdiff_t>(num)});
    num_computed_ = end;
    const std::size_t used = std::min(end * shift - first_sample_, samples_.size());  // no later frame needs these
    drop(samples_, used);
    first_sample_ += used;
    features_.insert(features_.end(), added.begin(), added.end());
    const std::vector<float> measured = loudness(added, *m_);
    levels_.insert(levels_.end(), measured.begin(), measured.end());
    trim();
  }

  /// Features [frames, mel] of the last window.
  Floats window() const {
    return {features_.begin(), features_.begin() + static_cast<std::ptrdiff_t>((end_ - begin_) * static_cast<std::size_t>(m_->feature_size))};
  }

  /// Number of encoder frames in the last window.
  std::size_t num_window_frames() const { return (end_ - begin_ - shortest_) / rate_ + 1; }

  bool window_is_full() const { return end_ - begin_ >= length_; }
  /// End the last window after `num` encoder frames. The next window begins there.
  void shorten_window(std::size_t num) {
    next_ = begin_ + num * rate_;
    end_ = std::min(end_, begin_ + num * rate_ + length_ - stride_);
  }

  /// Make the next window begin with the final `num` encoder frames of the last window.
  void repeat_window(std::size_t num) { next_ = begin_ + (num_window_frames() - num) * rate_; }

  /// Loudness of the feature frames of the last window.
  std::vector<float> window_levels() const { return levels(end_ - begin_); }
  /// Loudness of the first `num` feature frames that have not been forgotten.
  std::vector<float> levels(std::size_t num) const {
    return {levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(std::min(levels_.size(), num))};
  }

  /// Forget the loudness before encoder frame `start`.
  void forget(std::size_t start) {
    const std::size_t first = start * rate_;
    drop(levels_, first - levels_start_);
    levels_start_ = first;
  }

 private:
  template <class T>
  static void drop(std::vector<T>& items, std::size_t num) {
    items.erase(items.begin(), items.begin() + static_cast<std::ptrdiff_t>(std::min(num, items.size())));
  }

  void hear(const Floats& samples) { samples_.insert(samples_.end(), samples.begin(), samples.end()); }

  // Number of feature frames of all samples so far.
  std::size_t num_frames() const {
    const std::size_t num = first_sample_ + samples_.size();
    const auto frame = static_cast<std::size_t>(m_->frame_len()), shift = static_cast<std::size_t>(m_->shift_len());
    return num < frame ? 0 : 1 + (num - frame) / shift;
  }

  // Forget the features before the last window.
  void trim() {
    const auto bins = static_cast<std::size_t>(m_->feature_size);
    const std::size_t num = std::min(begin_ - first_feature_, features_.size() / bins);
    drop(features_, num * bins);
    first_feature_ += num;
  }

  const Manifest* m_;
  std::size_t rate_, stride_, shortest_, length_, needed_;  // in feature frames
  Padding padding_;
  std::size_t num_received_ = 0;
  bool is_finished_ = false;
  Floats samples_, features_;  // from first_sample_ and first_feature_ on
  std::size_t first_sample_ = 0, first_feature_ = 0, num_computed_ = 0;
  std::size_t begin_ = 0, end_ = 0, next_ = 0;  // feature frames of the last window, and first feature frame of the next
  std::vector<float> levels_;                   // from feature frame levels_start_ on
  std::size_t levels_start_ = 0;
};

}  // namespace u2moe::runtime
