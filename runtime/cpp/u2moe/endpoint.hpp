// Where utterances end: Kaldi's rules on the blanks of the CTC head, and the cut between two words within speech.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "beam_search.hpp"
#include "vocabulary.hpp"

namespace u2moe {

constexpr double kShortestPauseS = 0.4;  // with less trailing silence, an utterance may have been cut within a word

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

struct Endpoint {
  std::size_t num_frames;  // of those given that belong to the utterance
  int trailing_silence;    // frames
};

class Endpointer {
  static constexpr int kNever = std::numeric_limits<int>::max();

 public:
  Endpointer(const EndpointRules& rules, double frame_s, int blank) : blank_(blank) {
    const auto frames = [frame_s](double seconds) {
      const double count = std::ceil(std::round(seconds / frame_s * 1e6) / 1e6);
      return count < kNever ? static_cast<int>(count) : kNever;
    };
    for (const std::optional<EndpointRule>& rule : rules) {
      if (!rule) continue;
      rules_.push_back({rule->must_contain_nonsilence, frames(rule->min_trailing_silence), frames(rule->min_utterance_length)});
    }
  }

  void reset() { *this = Endpointer(rules_, blank_); }

  // Continue through log-probabilities [frames, vocab], up to the frame at which a rule fires.
  std::optional<Endpoint> advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
    static const double silence_log_prob = std::log(0.8);
    for (std::size_t index = 0; index < num_frames; ++index) {
      const bool silent = static_cast<double>(log_probs[index * vocab_size + static_cast<std::size_t>(blank_)]) > silence_log_prob;
      ++num_frames_;
      num_silent_ = silent ? num_silent_ + 1 : 0;
      has_speech_ |= !silent;
      for (const Rule& rule : rules_) {
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
    int silence, length;  // frames
  };

  Endpointer(std::vector<Rule> rules, int blank) : rules_(std::move(rules)), blank_(blank) {}

  std::vector<Rule> rules_;
  int blank_;
  int num_frames_ = 0, num_silent_ = 0;
  bool has_speech_ = false;
};

struct FrameSpan {
  std::ptrdiff_t start = -1, end = -1;
};

// The most probable alignment of tokens with log-probabilities [frames, vocab]; none if there are too few frames.
inline std::optional<std::vector<FrameSpan>> align(const std::vector<float>& log_probs, std::size_t vocab_size,
                                                   const std::vector<int>& tokens, int blank) {
  if (tokens.empty()) return std::vector<FrameSpan>{};
  std::vector<int> states = {blank};
  for (int token : tokens) states.insert(states.end(), {token, blank});
  const std::size_t num = states.size(), num_frames = log_probs.size() / vocab_size;
  std::vector<unsigned char> steps(num_frames * num);
  // Paths begin in the first blank, before the first frame. Blank may be left out between two different tokens.
  std::vector<double> scores(num, kNever), arrived(num);
  scores[0] = 0;
  for (std::size_t frame = 0; frame < num_frames; ++frame) {
    for (std::size_t state = 0; state < num; ++state) {
      unsigned char step = 0;
      double best = scores[state];
      if (state >= 1 && scores[state - 1] > best) {
        step = 1;
        best = scores[state - 1];
      }
      const bool may_skip = state >= 3 && state % 2 == 1 && states[state] != states[state - 2];
      if (may_skip && scores[state - 2] > best) {
        step = 2;
        best = scores[state - 2];
      }
      steps[frame * num + state] = step;
      arrived[state] = best + static_cast<double>(log_probs[frame * vocab_size + static_cast<std::size_t>(states[state])]);
    }
    scores.swap(arrived);
  }
  std::size_t last = num_frames && scores[num - 2] >= scores[num - 1] ? num - 2 : num - 1;
  if (!(scores[last] > kNever)) return std::nullopt;
  std::vector<FrameSpan> spans(tokens.size());
  for (std::size_t frame = num_frames; frame-- > 0;) {
    if (last % 2 == 1) {
      FrameSpan& span = spans[(last - 1) / 2];
      if (span.end < 0) span.end = static_cast<std::ptrdiff_t>(frame) + 1;
      span.start = static_cast<std::ptrdiff_t>(frame);
    }
    last -= steps[frame * num + last];
  }
  return spans;
}

// Frames before the cut: in the longest pause between two words in the second half; none without two words.
inline std::optional<std::size_t> find_cut(const Vocabulary& vocabulary, const std::vector<int>& tokens,
                                           const std::vector<float>& log_probs, std::size_t vocab_size, int blank) {
  const auto aligned = align(log_probs, vocab_size, tokens, blank);
  const std::vector<WordSpan> words = vocabulary.words(tokens);
  if (!aligned || words.size() < 2) return std::nullopt;
  const auto num_frames = static_cast<std::ptrdiff_t>(log_probs.size() / vocab_size);
  std::optional<FrameSpan> longest, final;
  for (std::size_t i = 1; i < words.size(); ++i) {
    final = FrameSpan{(*aligned)[words[i - 1].end - 1].end, (*aligned)[words[i].begin].start};
    const bool is_late = final->start + final->end >= num_frames;
    const auto length = [](const FrameSpan& pause) { return pause.end - pause.start; };
    if (is_late && (!longest || length(*final) >= length(*longest))) longest = final;
  }
  const FrameSpan pause = longest ? *longest : *final;
  return static_cast<std::size_t>((pause.start + pause.end + 1) / 2);
}

}  // namespace u2moe
