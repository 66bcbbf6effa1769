// Finds speech by the probabilities that a network for voice activity detection gives; as runtime/decoding/vad.py has it.
#pragma once

#include "records.hpp"

namespace u2moe::runtime {

/// See u2moe_vad_options.
struct VadOptions : VadNumbers {
  /// @throws InvalidArgument an option is out of range.
  void check() const {
    check_numbers<VadNumbers>(*this);
    check_range("threshold", threshold, 0, 1 - 1e-9);
    check_range("end_threshold", end_threshold, 0, threshold);
    check_range("padding", padding, 0, min_silence / 2);
  }
};

/// A part of a speech segment, from sample `start` of the source on.
struct Speech {
  std::size_t start;
  std::vector<float> samples;
  bool begins, ends;
};

/// Finds the speech of one source, with its padding; any split of its samples gives the same. Whoever has the network gives the
/// probability of each window.
class SpeechFinder {
 public:
  static constexpr int kRate = 16000;
  static constexpr std::size_t kWindow = 512;  ///< samples of a probability

  explicit SpeechFinder(const VadOptions& options)
      : options_(options), min_silent_(static_cast<std::size_t>(std::ceil(options.min_silence / (static_cast<double>(kWindow) / kRate)))),
        padding_(static_cast<std::size_t>(std::nearbyint(options.padding * kRate))) {}

  /// Append samples at 16 kHz.
  void accept(const std::vector<float>& samples) { held_.insert(held_.end(), samples.begin(), samples.end()); }
  /// End the source, padded with silence to a whole window.
  void finish() {
    const std::size_t rest = (held_start_ + held_.size() - heard_) % kWindow;
    if (rest) held_.resize(held_.size() + kWindow - rest);
    is_finished_ = true;
  }

  /// The next window without a probability; null: there is none yet.
  const float* window() const {
    return held_start_ + held_.size() - heard_ >= kWindow ? held_.data() + (heard_ - held_start_) : nullptr;
  }

  /// The probability that it is speech.
  void hear(double probability) {
    const bool goes_on = speaks_ && num_silent_ == 0;
    heard_ += kWindow;
    if (probability >= (goes_on ? options_.end_threshold : options_.threshold)) {
      if (!speaks_) {
        const std::size_t begin = heard_ - kWindow;
        given_ = std::max(given_, begin - std::min(begin, padding_));
        speaks_ = begins_ = true;
      }
      num_silent_ = 0;
      spoken_ = heard_;
      add_part(spoken_, false);
    } else if (++num_silent_ >= min_silent_ && speaks_) {
      add_part(spoken_ + padding_, true);
    }
    const std::size_t keep = speaks_ ? given_ : std::max(given_, heard_ - std::min(heard_, padding_));
    held_.erase(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(keep - held_start_));
    held_start_ = keep;
  }

  /// The next part that is certain.
  std::optional<Speech> take() {
    if (found_.empty() && is_finished_ && speaks_ && !window()) add_part(std::min(spoken_ + padding_, heard_), true);
    if (found_.empty()) return std::nullopt;
    std::optional<Speech> first = std::move(found_.front());
    found_.pop_front();
    return first;
  }

 private:
  void add_part(std::size_t end, bool ends) {
    const auto at = [this](std::size_t sample) { return held_.begin() + static_cast<std::ptrdiff_t>(sample - held_start_); };
    found_.push_back({given_, {at(given_), at(end)}, begins_, ends});
    given_ = end;
    begins_ = false;
    speaks_ = !ends;
  }

  VadOptions options_;
  std::vector<float> held_;                          // samples that may still be given, then those without a probability
  std::size_t held_start_ = 0, heard_ = 0;           // the first of them, and the first without a probability
  std::size_t given_ = 0, spoken_ = 0;               // ends of what was given or dropped, and of the last window with speech
  std::size_t num_silent_ = 0, min_silent_, padding_;
  bool speaks_ = false, begins_ = false, is_finished_ = false;
  std::deque<Speech> found_;
};

}  // namespace u2moe::runtime
