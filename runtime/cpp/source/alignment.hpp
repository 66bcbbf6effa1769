// Forced alignment of tokens with the CTC output, and cuts between words.
#pragma once

#include <cstddef>
#include <limits>
#include <optional>
#include <vector>

#include "vocabulary.hpp"

namespace u2moe::runtime {

/// The frames of a token.
struct FrameSpan {
  std::ptrdiff_t start = -1, end = -1;
};

/// The most probable alignment of tokens with log-probabilities [frames, vocab]; none if there are too few frames.
inline std::optional<std::vector<FrameSpan>> align(const std::vector<float>& log_probs, std::size_t vocab_size,
                                                   const std::vector<int>& tokens, int blank) {
  constexpr double never = -std::numeric_limits<double>::infinity();
  if (tokens.empty()) return std::vector<FrameSpan>{};
  std::vector<int> states = {blank};
  for (int token : tokens) states.insert(states.end(), {token, blank});
  const std::size_t num = states.size(), num_frames = log_probs.size() / vocab_size;
  std::vector<unsigned char> steps(num_frames * num);
  // Paths begin in the first blank, before the first frame. Blank may be left out between two different tokens.
  std::vector<double> scores(num, never), arrived(num);
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
  if (!(scores[last] > never)) return std::nullopt;
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

/// Frames before the cut: in the longest pause between two words in the second half; none without two words.
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

}  // namespace u2moe::runtime
