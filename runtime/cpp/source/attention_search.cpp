#include "attention_search.hpp"

#include <algorithm>
#include <cmath>

namespace u2moe::runtime {

std::vector<std::vector<int>> AttentionSearch::growing() const {
  std::vector<std::vector<int>> found;
  for (const Sequence& beam : beams_) {
    if (!beam.has_ended && num_steps_ < max_len_) found.push_back(beam.tokens);
  }
  return found;
}

void AttentionSearch::advance(const Floats& next) {
  const auto vocab_size = static_cast<std::size_t>(m_->vocab_size);
  std::vector<Sequence> grown;
  const float* row = next.data();
  for (const Sequence& beam : beams_) {
    if (beam.has_ended) {
      grown.push_back(beam);
      continue;
    }
    for (const int token : most_probable(row, vocab_size, beam_size_)) {
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

std::vector<Hypothesis> AttentionSearch::hypotheses() {
  for (Sequence& beam : beams_) beam.score /= std::pow(static_cast<double>(std::max<std::size_t>(length(beam), 1)), length_penalty_);
  sort();
  const auto has_length = [this](const Sequence& beam) { return length_penalty_ == 0 || length(beam) > 0; };
  std::stable_partition(beams_.begin(), beams_.end(), has_length);
  std::vector<Hypothesis> found;
  for (const Sequence& beam : beams_) found.push_back({beam.tokens, beam.score, 0, 0, {}, {}});
  return found;
}

void AttentionSearch::sort() {
  std::stable_sort(beams_.begin(), beams_.end(), [](const Sequence& one, const Sequence& other) { return one.score > other.score; });
}

}  // namespace u2moe::runtime
