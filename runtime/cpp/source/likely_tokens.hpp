// The most probable tokens of a frame, by which searches extend hypotheses.
#pragma once

#include "standard.hpp"

namespace u2moe::runtime {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // stands for a missing index; larger than every index

/// The most probable tokens of a row with their log-probabilities, in descending order. Ties are ordered by id.
class LikelyTokens {
 public:
  std::vector<int> tokens;
  std::vector<double> scores;

  /// Find the `num` best tokens of a row [vocab], or fewer.
  void find(const float* row, std::size_t vocab_size, std::size_t num) {
    num = std::min(num, vocab_size);
    // With scores rounded to steps, find all tokens that may be among the `num` best. Then sort these by their exact scores.
    std::array<std::size_t, kSteps> counts{};
    for (std::size_t token = 0; token < vocab_size; ++token) ++counts[step_of(row[token])];
    std::size_t least = 0;
    for (std::size_t found = counts[0]; found < num; found += counts[least]) ++least;
    found_.clear();
    for (std::size_t token = 0; token < vocab_size; ++token) {
      if (step_of(row[token]) <= least) found_.emplace_back(-row[token], static_cast<int>(token));
    }
    const auto end = found_.begin() + static_cast<std::ptrdiff_t>(num);
    if (end != found_.end()) std::nth_element(found_.begin(), end, found_.end());
    std::sort(found_.begin(), end);
    for (const int token : tokens) ranks_[static_cast<std::size_t>(token)] = kNone;
    ranks_.resize(vocab_size, kNone);
    tokens.clear();
    scores.clear();
    for (auto each = found_.begin(); each != end; ++each) {
      ranks_[static_cast<std::size_t>(each->second)] = tokens.size();
      tokens.push_back(each->second);
      scores.push_back(-static_cast<double>(each->first));
    }
  }

  /// Rank of a token; kNone if it is not among the most probable tokens.
  std::size_t rank_of(int token) const { return token < 0 ? kNone : ranks_[static_cast<std::size_t>(token)]; }

 private:
  static constexpr std::size_t kSteps = 256;

  static std::size_t step_of(float score) { return static_cast<std::size_t>(std::min(255.0F, std::max(0.0F, -8 * score))); }

  std::vector<std::pair<float, int>> found_;
  std::vector<std::size_t> ranks_;
};

}  // namespace u2moe::runtime
