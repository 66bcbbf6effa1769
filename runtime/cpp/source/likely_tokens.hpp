// The most probable tokens of a frame, with which searches extend hypotheses.
#pragma once

#include "standard.hpp"

namespace u2moe::runtime {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // stands for a missing index; larger than every index

/// The most probable tokens of a row with their log-probabilities, in descending order. Ties are ordered by id.
class LikelyTokens {
 public:
  std::vector<int> tokens;
  std::vector<double> scores;

  /// Find the `num` best tokens of a row [vocab], or all if it has fewer.
  void find(const float* row, std::size_t vocab_size, std::size_t num) {
    num = std::min(num, vocab_size);
    // First use rounded scores to find all candidates for the `num` best tokens. Then select and sort the best by exact score.
    steps_.resize(vocab_size);
    std::transform(row, row + vocab_size, steps_.begin(), step_of);
    std::array<std::size_t, 256> counts{};
    for (const unsigned char step : steps_) ++counts[step];
    std::size_t least = 0;
    for (std::size_t found = counts[0]; found < num; found += counts[least]) ++least;
    keys_.resize(vocab_size);
    auto last = keys_.begin();
    for (std::size_t token = 0; token < vocab_size; ++token) {
      *last = key_of(row[token], token);
      last += steps_[token] <= least ? 1 : 0;  // without a branch, which processors would often mispredict
    }
    const auto end = keys_.begin() + static_cast<std::ptrdiff_t>(num);
    if (end != last) std::nth_element(keys_.begin(), end, last);
    std::sort(keys_.begin(), end);
    for (const int token : tokens) ranks_[static_cast<std::size_t>(token)] = kNone;
    ranks_.resize(vocab_size, kNone);
    tokens.clear();
    scores.clear();
    for (auto each = keys_.begin(); each != end; ++each) {
      const auto token = static_cast<std::size_t>(*each & 0xffffffff);
      ranks_[token] = tokens.size();
      tokens.push_back(static_cast<int>(token));
      scores.push_back(static_cast<double>(row[token]));
    }
  }

  /// Rank of a token; kNone if it is not among the most probable tokens.
  std::size_t rank_of(int token) const { return token < 0 ? kNone : ranks_[static_cast<std::size_t>(token)]; }

 private:
  static unsigned char step_of(float score) { return static_cast<unsigned char>(-8 * std::max(-31.875F, std::min(0.0F, score))); }

  // Sort key: lower for a higher score. If scores are equal, it is lower for a lower id.
  static std::uint64_t key_of(float score, std::size_t token) {
    const float below = 0.0F - score;  // never -0
    std::uint32_t bits;
    std::memcpy(&bits, &below, sizeof bits);
    return static_cast<std::uint64_t>(bits ^ (bits >> 31 ? ~0U : 1U << 31)) << 32 | token;
  }

  std::vector<unsigned char> steps_;
  std::vector<std::uint64_t> keys_;
  std::vector<std::size_t> ranks_;
};

}  // namespace u2moe::runtime
