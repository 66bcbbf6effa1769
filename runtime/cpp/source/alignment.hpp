// Forced alignment of tokens with the CTC output, and cuts between words.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "vocabulary.hpp"

namespace u2moe::runtime {

/// The frames of a token.
struct FrameSpan {
  std::ptrdiff_t start = -1, end = -1;
};

/// The most probable alignment of tokens with log-probabilities [frames, vocab]; none if there are too few frames.
std::optional<std::vector<FrameSpan>> align(const std::vector<float>& log_probs, std::size_t vocab_size, const std::vector<int>& tokens,
                                            int blank);

/// Frames before the cut: in the longest pause between two words in the second half; none without two words.
std::optional<std::size_t> find_cut(const Vocabulary& vocabulary, const std::vector<int>& tokens, const std::vector<float>& log_probs,
                                    std::size_t vocab_size, int blank);

}  // namespace u2moe::runtime
