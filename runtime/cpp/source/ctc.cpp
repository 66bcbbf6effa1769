#include "ctc.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace u2moe::runtime {
namespace {

Hypothesis hypothesis_of(const Beam& beam) {
  Hypothesis found{beam.prefix->tokens(), beam.score(), beam.prefix->bonus, beam.prefix->language_score, {}, {}};
  for (const Peak* peak = beam.times.get(); peak; peak = peak->before.get()) {
    found.times.push_back(peak->frame);
    found.probabilities.push_back(std::min(std::exp(peak->score), 1.0));
  }
  std::reverse(found.times.begin(), found.times.end());
  std::reverse(found.probabilities.begin(), found.probabilities.end());
  return found;
}

}  // namespace

std::vector<int> most_probable(const float* row, std::size_t vocab_size, std::size_t num) {
  std::vector<int> tokens;
  num = std::min(num, vocab_size);
  for (std::size_t token = 0; token < vocab_size; ++token) {
    if (tokens.size() == num && !(row[token] > row[tokens.back()])) continue;
    if (tokens.size() == num) tokens.pop_back();
    auto place = tokens.end();
    while (place != tokens.begin() && row[*(place - 1)] < row[token]) --place;
    tokens.insert(place, static_cast<int>(token));
  }
  return tokens;
}

void GreedySearch::advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
  for (std::size_t frame = 0; frame < num_frames; ++frame, ++num_frames_) {
    const float* row = log_probs + frame * vocab_size;
    const float* best = std::max_element(row, row + vocab_size);
    const int token = static_cast<int>(best - row);
    found_.score += static_cast<double>(*best);
    if (token != blank_ && token != last_) {
      found_.tokens.push_back(token);
      found_.times.push_back(num_frames_);
      found_.probabilities.push_back(std::min(std::exp(static_cast<double>(*best)), 1.0));
    }
    last_ = token;
  }
}

PrefixBeamSearch::PrefixBeamSearch(std::size_t beam_size, int blank, const std::shared_ptr<const ContextGraph>& context,
                                   const std::shared_ptr<const Fusion>& fusion)
    : beam_size_(beam_size), sorts_(context || fusion) {
  const auto states = fusion ? std::make_shared<FusionStates>(fusion) : nullptr;
  searches_.emplace_back(beam_size, blank, context, states, false);
  if (context) searches_.emplace_back(beam_size, blank, context, states, true);
}

void PrefixBeamSearch::advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
  std::vector<double> scores;
  for (std::size_t frame = 0; frame < num_frames; ++frame) {
    const float* row = log_probs + frame * vocab_size;
    const std::vector<int> tokens = most_probable(row, vocab_size, beam_size_);
    scores.clear();
    for (const int token : tokens) scores.push_back(static_cast<double>(row[token]));
    for (BeamSearch& search : searches_) search.advance(tokens, scores);
  }
}

void PrefixBeamSearch::finish() {
  for (BeamSearch& search : searches_) search.finish();
}

std::vector<Hypothesis> PrefixBeamSearch::hypotheses(std::size_t limit) const {
  std::vector<const Beam*> beams;
  for (const Beam& beam : searches_[0].beams()) beams.push_back(&beam);
  if (searches_.size() > 1) {
    std::set<std::vector<int>> known;
    for (const Beam* beam : beams) known.insert(beam->prefix->tokens());
    for (const Beam& beam : searches_[1].beams()) {
      if (beam.prefix->bonus > 0 && !known.count(beam.prefix->tokens())) beams.push_back(&beam);
    }
  }
  const auto better = [](const Beam* one, const Beam* other) { return one->score() > other->score(); };
  if (sorts_) std::stable_sort(beams.begin(), beams.end(), better);
  std::vector<Hypothesis> found;
  for (std::size_t i = 0; i < std::min(limit, beams.size()); ++i) found.push_back(hypothesis_of(*beams[i]));
  return found;
}

}  // namespace u2moe::runtime
