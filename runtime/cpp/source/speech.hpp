// Finds speech by the probabilities that a network for voice activity detection gives; as runtime/decoding/vad.py has it.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <vector>

namespace u2moe::runtime {

/// See u2moe_vad_options.
struct VadOptions {
  double threshold = 0.5, end_threshold = 0.35, min_silence = 0.6, padding = 0.3;

  /// @throws InvalidArgument an option is out of range.
  void check() const;
};

/// A part of a stretch of speech, from sample `start` of the source on.
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

  explicit SpeechFinder(const VadOptions& options);

  /// Append samples at 16 kHz.
  void accept(const std::vector<float>& samples) { held_.insert(held_.end(), samples.begin(), samples.end()); }
  /// End the source, padded with silence to a whole window.
  void finish();

  /// The next window without a probability; null: there is none yet.
  const float* window() const;
  /// The probability that it is speech.
  void hear(double probability);

  /// The next part that is certain.
  std::optional<Speech> take();

 private:
  void add_part(std::size_t end, bool ends);

  VadOptions options_;
  std::vector<float> held_;                          // samples that may still be given, then those without a probability
  std::size_t held_start_ = 0, heard_ = 0;           // the first of them, and the first without a probability
  std::size_t given_ = 0, spoken_ = 0;               // ends of what was given or dropped, and of the last window with speech
  std::size_t num_silent_ = 0, min_silent_, padding_;
  bool speaks_ = false, begins_ = false, is_finished_ = false;
  std::deque<Speech> found_;
};

}  // namespace u2moe::runtime
