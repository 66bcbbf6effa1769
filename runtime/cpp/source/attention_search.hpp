// Beam search with the decoder from left to right alone; as runtime/decoding/rescoring.py has it.
#pragma once

#include <cstddef>
#include <vector>

#include "ctc.hpp"
#include "manifest.hpp"

namespace u2moe::runtime {

/// Whoever has the decoder asks for the sequences that grow, and gives what may follow each.
class AttentionSearch {
 public:
  /// @param max_len tokens after which it stops: in WeNet, the number of encoder frames.
  /// @param length_penalty scores are divided by length ** length_penalty; eos does not count, sos does if it is another token.
  AttentionSearch(const Manifest& manifest, std::size_t max_len, std::size_t beam_size, double length_penalty)
      : m_(&manifest), max_len_(max_len), beam_size_(beam_size), length_penalty_(length_penalty) {}

  /// Sequences to continue; none: the search has ended.
  std::vector<std::vector<int>> growing() const;

  /// Continue them by log-probabilities [sequences, vocab] of their next tokens.
  void advance(const Floats& next);

  /// Best first, without times.
  std::vector<Hypothesis> hypotheses();

 private:
  struct Sequence {
    double score = 0;
    std::vector<int> tokens;
    bool has_ended = false;
  };

  std::size_t length(const Sequence& sequence) const { return sequence.tokens.size() + (m_->sos != m_->eos); }
  void sort();

  const Manifest* m_;
  std::size_t max_len_, beam_size_, num_steps_ = 0;
  double length_penalty_;
  std::vector<Sequence> beams_ = {Sequence()};
};

}  // namespace u2moe::runtime
