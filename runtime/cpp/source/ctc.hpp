// The first pass: greedy search and prefix beam search, both incremental.
#pragma once

#include <limits>
#include <memory>
#include <vector>

#include "beam_search.hpp"

namespace u2moe::runtime {

struct Hypothesis {
  std::vector<int> tokens;
  double score = 0;                   ///< log-probability of all alignments, bonus of hotwords and score of the language model
  double context_score = 0;           ///< that bonus
  double language_score = 0;          ///< that score
  std::vector<int> times;             ///< encoder frame at which each token peaks, or begins in greedy search
  std::vector<double> probabilities;  ///< of each token at that frame
};

/// The most probable tokens of a row, most probable first, ties by id.
std::vector<int> most_probable(const float* row, std::size_t vocab_size, std::size_t num);

/// A search that goes on from chunk to chunk.
class CtcSearch {
 public:
  virtual ~CtcSearch() = default;

  /// Continue with log-probabilities [frames, vocab].
  virtual void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) = 0;

  /// End the input: hotwords that are complete at the end earn their bonus, incomplete ones do not, and the language model
  /// scores the last word.
  virtual void finish() {}

  /// Hypotheses so far, best first; with hotwords, at most twice as many as the beam holds.
  virtual std::vector<Hypothesis> hypotheses(std::size_t limit = std::numeric_limits<std::size_t>::max()) const = 0;
};

/// The most probable token of each frame, with repeats merged and blanks removed.
class GreedySearch : public CtcSearch {
 public:
  explicit GreedySearch(int blank) : blank_(blank) {}

  void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) override;
  std::vector<Hypothesis> hypotheses(std::size_t) const override { return {found_}; }

 private:
  int blank_, last_ = -1, num_frames_ = 0;
  Hypothesis found_;
};

/// With hotwords two searches run side by side. One ignores them; the other ranks prefixes by score plus bonus. Hotwords that
/// no hypothesis contains therefore change nothing.
class PrefixBeamSearch : public CtcSearch {
 public:
  /// @param context null: no hotwords.
  /// @param fusion null: no language model.
  PrefixBeamSearch(std::size_t beam_size, int blank, const std::shared_ptr<const ContextGraph>& context,
                   const std::shared_ptr<const Fusion>& fusion);

  void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) override;
  void finish() override;
  std::vector<Hypothesis> hypotheses(std::size_t limit) const override;

 private:
  std::size_t beam_size_;
  bool sorts_;
  std::vector<BeamSearch> searches_;
};

}  // namespace u2moe::runtime
