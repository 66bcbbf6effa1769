// Ends of utterances and words. Utterances end according to Kaldi's rules, applied to the blanks of the CTC output. With
// full context, utterances also end at pauses in the audio. Words next to a pause end or begin there.
#pragma once

#include "standard.hpp"

namespace u2moe::runtime {

using Seconds = std::pair<double, double>;  ///< start and end in seconds

/// Find the quiet parts of an utterance from the loudness of its frames. Times are in seconds after the first frame.
inline std::vector<Seconds> find_pauses(const std::vector<float>& levels, double frame_s) {
  if (levels.empty()) return {};
  std::vector<float> sorted = levels;
  std::sort(sorted.begin(), sorted.end());
  const auto percentile = [&sorted](double share) {
    const double place = share * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<std::size_t>(place);
    const double low = static_cast<double>(sorted[below]), high = static_cast<double>(sorted[std::min(below + 1, sorted.size() - 1)]);
    return low + (high - low) * (place - static_cast<double>(below));
  };
  const double loud = percentile(0.99), floor = std::max(percentile(0.1), loud - 12);
  const auto threshold = static_cast<float>(floor + 0.2 * (loud - floor));
  std::vector<Seconds> pauses;
  std::size_t start = 0;
  for (std::size_t frame = 0; frame <= levels.size(); ++frame) {
    if (frame < levels.size() && levels[frame] < threshold) continue;
    const double begin = static_cast<double>(start) * frame_s, end = static_cast<double>(frame) * frame_s;
    if (frame > start && end - begin >= 0.08 - 1e-9) pauses.emplace_back(begin, end);
    start = frame + 1;
  }
  return pauses;
}

/// Find the first pause that lasts at least `min_pause_s` and whose middle comes after `after_s`.
inline std::optional<Seconds> first_pause(const std::vector<float>& levels, double frame_s, double min_pause_s, double after_s) {
  constexpr double min_before_s = 0.2;  // an earlier pause has nothing before it that could be cut off
  for (const Seconds& pause : find_pauses(levels, frame_s)) {
    const auto [start, end] = pause;
    if (end - start >= min_pause_s - 1e-9 && start >= min_before_s && (start + end) / 2 > after_s) return pause;
  }
  return std::nullopt;
}

/// Find the longest pause between the peaks of neighbouring words. End the first word and begin the second at its edges.
inline void end_at_pauses(std::vector<Seconds>& words, const std::vector<Seconds>& peaks, const std::vector<Seconds>& pauses) {
  constexpr double far = std::numeric_limits<double>::infinity(), longest_token_s = 1;
  for (std::size_t place = 0; place <= words.size(); ++place) {
    const bool has_next = place < words.size();
    const double before = place ? peaks[place - 1].second : -far, after = has_next ? peaks[place].first : far;
    const double earliest = place ? words[place - 1].first : -far, latest = has_next ? words[place].second : far;
    const Seconds* best = nullptr;
    for (const Seconds& pause : pauses) {
      const auto& [start, end] = pause;
      if (end < before || start > after || start <= earliest || end >= latest) continue;
      if (!best || end - start > best->second - best->first) best = &pause;
    }
    if (!best) continue;
    if (place && best->first - std::max(before, earliest) <= longest_token_s) words[place - 1].second = best->first;
    if (has_next && after - best->second <= longest_token_s) words[place].first = best->second;
    else if (place && has_next) words[place].first = std::max(words[place].first, words[place - 1].second);
  }
}

/// A rule fires when the utterance has the minimum length and trailing silence and, if required, contains speech.
struct EndpointRule {
  bool must_contain_nonsilence = false;
  double min_trailing_silence = 0, min_utterance_length = 0;  ///< seconds

  /// Whether no duration is negative and at least one is above 0. With both 0, the rule would fire at every frame.
  bool is_valid() const {
    return min_trailing_silence >= 0 && min_utterance_length >= 0 && min_trailing_silence + min_utterance_length > 0;
  }
};
using EndpointRules = std::array<std::optional<EndpointRule>, 3>;  ///< an utterance ends when any rule fires; nullopt: rule off

struct Endpoint {
  std::size_t num_frames;            ///< number of frames of the last call that belong to the utterance
  std::int64_t trailing_silence;     ///< frames
};

class Endpointer {
 public:
  /// @param turn threshold for the probability of a sentence end; 0: off. If the probability reaches it, the second rule's
  /// minimum silence is halved; otherwise, the silence is multiplied by 1.5.
  Endpointer(const EndpointRules& rules, double frame_s, int blank, double turn = 0) : blank_(blank), turn_(turn) {
    const auto frames = [frame_s](double seconds) {
      constexpr int never = std::numeric_limits<int>::max();
      // Rounding removes division errors: 0.28 s is 7 frames of 40 ms, but in floating point 0.28 / 0.04 > 7.
      const double count = std::ceil(std::round(seconds / frame_s * 1e6) / 1e6);
      return count < never ? static_cast<int>(count) : never;
    };
    for (const std::optional<EndpointRule>& rule : rules) {
      if (!rule) continue;
      const bool asks = turn > 0 && &rule == &rules[1];
      const double silence = rule->min_trailing_silence;
      const Rule early{rule->must_contain_nonsilence, frames(silence * (asks ? 0.5 : 1)), frames(rule->min_utterance_length)};
      early_.push_back(early);
      late_.push_back({early.needs_speech, frames(silence * (asks ? 1.5 : 1)), early.length});
      if (asks) num_asked_ = early.silence;
    }
  }

  void reset() {
    num_frames_ = num_silent_ = 0;
    has_speech_ = is_over_ = false;
  }

  int trailing_silence() const { return num_silent_; }

  /// Process log-probabilities [frames, vocab] up to the frame at which a rule fires.
  /// @param end_probability returns the probability that a sentence ends after a number of frames, which grows with each call.
  template <class EndProbability>
  std::optional<Endpoint> advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size, EndProbability end_probability) {
    static const double silence_log_prob = std::log(0.8);
    for (std::size_t index = 0; index < num_frames; ++index) {
      const bool silent = static_cast<double>(log_probs[index * vocab_size + static_cast<std::size_t>(blank_)]) > silence_log_prob;
      ++num_frames_;
      num_silent_ = silent ? num_silent_ + 1 : 0;
      has_speech_ |= !silent;
      if (!silent) is_over_ = false;
      else if (num_silent_ == num_asked_) is_over_ = end_probability(index + 1) >= turn_;
      for (const Rule& rule : is_over_ ? early_ : late_) {
        if (num_silent_ >= rule.silence && num_frames_ >= rule.length && (has_speech_ || !rule.needs_speech)) {
          return Endpoint{index + 1, num_silent_};
        }
      }
    }
    return std::nullopt;
  }

 private:
  struct Rule {
    bool needs_speech;
    int silence, length;  // in frames
  };

  std::vector<Rule> early_, late_;
  int blank_, num_asked_ = 0;  // `num_asked_`: number of silent frames after which `end_probability` is called
  double turn_;
  int num_frames_ = 0, num_silent_ = 0;
  bool has_speech_ = false, is_over_ = false;
};

/// With full context, ends a window of a long recording, and its utterance, in the middle of the window's first pause.
/// `end_of_window` finds the pause. `endpoint` rejects the pause if the CTC output has a token shortly before its middle. A
/// recording that fits into one window is encoded as a whole, as in WeNet.
class PauseRule {
 public:
  /// @param min_pause in seconds; 0: do not shorten windows.
  PauseRule(double min_pause, double frame_s, double level_s) : min_pause_(min_pause), frame_s_(frame_s), level_s_(level_s) {}

  /// Return the number of encoder frames up to the middle of the window's first pause; std::nullopt: use the whole window.
  /// @param levels loudness of the window's feature frames.
  /// @param start encoder frame of the recording at which the window begins.
  std::optional<std::size_t> end_of_window(const std::vector<float>& levels, std::size_t start, bool is_full, bool is_last) {
    pause_len_ = 0;
    is_long_ |= is_full;
    if (min_pause_ <= 0 || !is_long_) return std::nullopt;
    const double after = (static_cast<double>(rejected_until_) - static_cast<double>(start)) * frame_s_;
    const std::optional<Seconds> pause = first_pause(levels, level_s_, min_pause_, after);
    if (!pause || (is_last && pause->second >= static_cast<double>(levels.size()) * level_s_)) return std::nullopt;
    pause_len_ = static_cast<std::int64_t>((pause->second - pause->first) / frame_s_);
    return static_cast<std::size_t>((pause->first + pause->second) / 2 / frame_s_);
  }

  /// Return the endpoint if the window ends in a pause and the CTC output is also silent there.
  /// @param num_frames number of encoder frames of the recording so far.
  std::optional<Endpoint> endpoint(std::size_t num_frames, int trailing_silence) {
    constexpr double silent_before_cut_s = 0.12;  // a pause is quiet speech if a token lies this close before the middle
    const std::int64_t pause_len = pause_len_;
    pause_len_ = 0;
    if (!pause_len) return std::nullopt;
    if (trailing_silence * frame_s_ < silent_before_cut_s) {
      rejected_until_ = num_frames;
      return std::nullopt;
    }
    return Endpoint{0, pause_len};
  }

 private:
  double min_pause_, frame_s_, level_s_;
  bool is_long_ = false;
  std::size_t rejected_until_ = 0;  // encoder frame up to which pauses were rejected as quiet speech
  std::int64_t pause_len_ = 0;      // encoder frames of the pause at the end of the last window, if any
};

}  // namespace u2moe::runtime
