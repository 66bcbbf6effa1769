// Beam search with only the left-to-right decoder, as in runtime/decoding/rescoring.py.
#pragma once

#include "ctc.hpp"
#include "manifest.hpp"

namespace u2moe::runtime {

/// Beam search of the decoder. The caller runs the decoder on `growing`, and passes the scores of next tokens to `advance`.
class AttentionSearch {
 public:
  /// @param max_len number of tokens after which the search stops. WeNet uses the number of encoder frames.
  /// @param length_penalty scores are divided by length ** length_penalty. The length excludes eos, and sos if it equals eos.
  AttentionSearch(const Manifest& manifest, std::size_t max_len, std::size_t beam_size, double length_penalty)
      : m_(&manifest), max_len_(max_len), beam_size_(beam_size), length_penalty_(length_penalty) {}

  /// Sequences that the search continues; empty when the search has ended.
  std::vector<std::vector<int>> growing() const {
    std::vector<std::vector<int>> found;
    for (const Sequence& beam : beams_) {
      if (!beam.has_ended && num_steps_ < max_len_) found.push_back(beam.tokens);
    }
    return found;
  }

  /// Continue the sequences, given the log-probabilities [sequences, vocab] of their next tokens.
  void advance(const Floats& next) {
    const auto vocab_size = static_cast<std::size_t>(m_->vocab_size);
    std::vector<Sequence> grown;
    const float* row = next.data();
    LikelyTokens likely;
    for (const Sequence& beam : beams_) {
      if (beam.has_ended) {
        grown.push_back(beam);
        continue;
      }
      likely.find(row, vocab_size, beam_size_);
      for (const int token : likely.tokens) {
        Sequence& longer = grown.emplace_back(beam);
        longer.score += static_cast<double>(row[token]);
        longer.has_ended = token == m_->eos;
        if (!longer.has_ended) longer.tokens.push_back(token);
      }
      row += vocab_size;
    }
    beams_ = std::move(grown);
    sort();
    beams_.resize(std::min(beams_.size(), beam_size_));
    ++num_steps_;
  }

  /// Hypotheses without times, best first.
  std::vector<Hypothesis> hypotheses() {
    for (Sequence& beam : beams_) beam.score /= std::pow(static_cast<double>(std::max<std::size_t>(length(beam), 1)), length_penalty_);
    sort();
    const auto has_length = [this](const Sequence& beam) { return length_penalty_ == 0 || length(beam) > 0; };
    std::stable_partition(beams_.begin(), beams_.end(), has_length);
    std::vector<Hypothesis> found;
    for (const Sequence& beam : beams_) found.push_back({beam.tokens, beam.score, 0, 0, {}, {}});
    return found;
  }

 private:
  struct Sequence {
    double score = 0;
    std::vector<int> tokens;
    bool has_ended = false;
  };

  std::size_t length(const Sequence& sequence) const { return sequence.tokens.size() + (m_->sos != m_->eos); }

  void sort() {
    std::stable_sort(beams_.begin(), beams_.end(), [](const Sequence& one, const Sequence& other) { return one.score > other.score; });
  }

  const Manifest* m_;
  std::size_t max_len_, beam_size_, num_steps_ = 0;
  double length_penalty_;
  std::vector<Sequence> beams_ = {Sequence()};
};

}  // namespace u2moe::runtime
