// Where utterances end: Kaldi's rules on the blanks of the CTC head and, with full context, pauses in the audio.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace u2moe::runtime {

constexpr double kShortestPauseS = 0.4;  ///< with less trailing silence, an utterance may have been cut within a word

/// A rule fires when the utterance has the minimum length and trailing silence and, if required, contains speech.
struct EndpointRule {
  bool must_contain_nonsilence = false;
  double min_trailing_silence = 0, min_utterance_length = 0;  ///< seconds

  /// A rule without any minimum would fire at every frame.
  bool is_valid() const {
    return min_trailing_silence >= 0 && min_utterance_length >= 0 && min_trailing_silence + min_utterance_length > 0;
  }
};
using EndpointRules = std::array<std::optional<EndpointRule>, 3>;  ///< an utterance ends when any fires; std::nullopt: none

const EndpointRules kDefaultRules = {EndpointRule{false, 2.4, 0}, EndpointRule{true, 1.2, 0}, EndpointRule{false, 0, 20}};  ///< Kaldi's
constexpr double kDefaultPauseS = 0.5;

struct Endpoint {
  std::size_t num_frames;            ///< of those given that belong to the utterance
  std::int64_t trailing_silence;     ///< frames
};

class Endpointer {
 public:
  Endpointer(const EndpointRules& rules, double frame_s, int blank);

  void reset();

  int trailing_silence() const { return num_silent_; }

  /// Continue through log-probabilities [frames, vocab], up to the frame at which a rule fires.
  std::optional<Endpoint> advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size);

 private:
  struct Rule {
    bool needs_speech;
    int silence, length;  // frames
  };

  std::vector<Rule> rules_;
  int blank_;
  int num_frames_ = 0, num_silent_ = 0;
  bool has_speech_ = false;
};

/// With full context, ends a window of a long recording, and the utterance, in the middle of its first pause: `end_of_window`
/// finds it, and `endpoint` confirms it unless the CTC head has found tokens there. A recording that fits into one window is
/// encoded as a whole, as in WeNet.
class PauseRule {
 public:
  /// @param min_pause seconds; 0: do not end windows.
  PauseRule(double min_pause, double frame_s, double level_s) : min_pause_(min_pause), frame_s_(frame_s), level_s_(level_s) {}

  /// Encoder frames of a window up to the middle of its first pause; none: use the whole window.
  /// @param levels loudness of its feature frames.
  /// @param start encoder frame of the recording at which it begins.
  std::optional<std::size_t> end_of_window(const std::vector<float>& levels, std::size_t start, bool is_full, bool is_last);

  /// The end of the utterance, if the window ends in a pause that is also silent for the CTC head.
  /// @param num_frames encoder frames of the recording so far.
  std::optional<Endpoint> endpoint(std::size_t num_frames, int trailing_silence);

 private:
  double min_pause_, frame_s_, level_s_;
  bool is_long_ = false;
  std::size_t rejected_until_ = 0;  // encoder frame up to which pauses were quiet speech
  std::int64_t pause_len_ = 0;      // encoder frames of the pause in which the last window ends, if any
};

}  // namespace u2moe::runtime
