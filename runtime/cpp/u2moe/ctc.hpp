// The first pass: incremental CTC prefix beam search, with or without hotwords.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <vector>

#include "beam_search.hpp"

namespace u2moe {

struct Hypothesis {
  std::vector<int> tokens;
  double score;                       ///< log-probability of all alignments, and the bonus of hotwords
  double context_score;               ///< that bonus
  std::vector<int> times;             ///< encoder frame at which each token peaks
  std::vector<double> probabilities;  ///< of each token at that frame
};

/// With hotwords two searches run side by side. One ignores them; the other ranks prefixes by score plus bonus. Hotwords that
/// no hypothesis contains therefore change nothing.
class PrefixBeamSearch {
 public:
  /// @param context null: no hotwords.
  PrefixBeamSearch(std::size_t beam_size, int blank, const std::shared_ptr<const ContextGraph>& context) : beam_size_(beam_size) {
    searches_.emplace_back(beam_size, blank, context, false);
    if (context) searches_.emplace_back(beam_size, blank, context, true);
  }

  /// Continue with log-probabilities [frames, vocab].
  void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
    std::vector<int> tokens;
    std::vector<double> scores;
    for (std::size_t frame = 0; frame < num_frames; ++frame) {
      const float* row = log_probs + frame * vocab_size;
      choose(row, vocab_size, tokens);
      scores.clear();
      for (const int token : tokens) scores.push_back(static_cast<double>(row[token]));
      for (BeamSearch& search : searches_) search.advance(tokens, scores);
    }
  }

  /// End the input: hotwords that are complete at the end earn their bonus, incomplete ones do not.
  void finish() {
    for (BeamSearch& search : searches_) search.finish();
  }

  /// Hypotheses so far, best first; with hotwords, at most twice as many as the beam holds.
  std::vector<Hypothesis> hypotheses() const {
    std::vector<const Beam*> beams;
    for (const Beam& beam : searches_[0].beams()) beams.push_back(&beam);
    if (searches_.size() > 1) {
      std::set<std::vector<int>> known;
      for (const Beam* beam : beams) known.insert(beam->prefix->tokens());
      for (const Beam& beam : searches_[1].beams()) {
        if (beam.prefix->bonus > 0 && !known.count(beam.prefix->tokens())) beams.push_back(&beam);
      }
      const auto better = [](const Beam* one, const Beam* other) { return score_of(*one) > score_of(*other); };
      std::stable_sort(beams.begin(), beams.end(), better);
    }
    std::vector<Hypothesis> found;
    for (const Beam* beam : beams) found.push_back(hypothesis_of(*beam));
    return found;
  }

  /// The first of them.
  Hypothesis best() const {
    if (searches_.size() > 1) return hypotheses()[0];
    return hypothesis_of(searches_[0].beams()[0]);
  }

 private:
  static double score_of(const Beam& beam) { return beam.total + beam.prefix->bonus; }

  static Hypothesis hypothesis_of(const Beam& beam) {
    Hypothesis hypothesis{beam.prefix->tokens(), score_of(beam), beam.prefix->bonus, {}, {}};
    for (const Peak* peak = beam.times().get(); peak; peak = peak->before.get()) {
      hypothesis.times.push_back(peak->frame);
      hypothesis.probabilities.push_back(std::min(std::exp(peak->score), 1.0));
    }
    std::reverse(hypothesis.times.begin(), hypothesis.times.end());
    std::reverse(hypothesis.probabilities.begin(), hypothesis.probabilities.end());
    return hypothesis;
  }

  // The most probable tokens of a frame, most probable first, ties by id.
  void choose(const float* row, std::size_t vocab_size, std::vector<int>& tokens) const {
    const std::size_t num = std::min(beam_size_, vocab_size);
    tokens.clear();
    for (std::size_t token = 0; token < vocab_size; ++token) {
      if (tokens.size() == num && !(row[token] > row[tokens.back()])) continue;
      if (tokens.size() == num) tokens.pop_back();
      auto place = tokens.end();
      while (place != tokens.begin() && row[*(place - 1)] < row[token]) --place;
      tokens.insert(place, static_cast<int>(token));
    }
  }

  std::size_t beam_size_;
  std::vector<BeamSearch> searches_;
};

}  // namespace u2moe
