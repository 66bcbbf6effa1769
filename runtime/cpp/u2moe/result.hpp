// Final results: scores of both passes, words that end at pauses in the audio, and their confidences.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "ctc.hpp"
#include "graphs.hpp"
#include "pauses.hpp"

namespace u2moe {

struct Word {
  std::string text;
  double start, end;  ///< seconds from the first sample of the stream
  double confidence;  ///< 0 to 1; calibrated if the bundle is
};

struct Alternative {
  std::string text;
  std::vector<int> tokens;
  double score;  ///< of both passes, with the bonus of hotwords
};

/// A partial result has text, tokens and times of the first pass only.
struct Result {
  std::string text;
  bool is_final;
  int segment;  ///< number of the utterance among those with words
  std::vector<int> tokens;
  std::vector<double> times;  ///< seconds at which each token peaks
  std::vector<Word> words;
  std::vector<Alternative> nbest;  ///< best first
};

struct Ranked {
  Hypothesis hypothesis;
  double score;
  std::vector<double> probabilities;  // of each token, averaged over the decoders and the CTC head
};

// score = (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left + ctc_weight * ctc + bonus, best first.
inline std::vector<Ranked> attention_rescoring(std::vector<Hypothesis> hypotheses, const TokenScores& scores, double ctc_weight,
                                               double reverse_weight) {
  std::vector<Ranked> ranked;
  const bool uses_right = !scores.right.empty() && reverse_weight > 0;
  for (std::size_t row = 0; row < hypotheses.size(); ++row) {
    Hypothesis& hypothesis = hypotheses[row];
    const float* left = scores.left.data() + row * scores.width;
    const float* right = uses_right ? scores.right.data() + row * scores.width : nullptr;
    double from_left = 0, from_right = 0;
    std::vector<double> probabilities;
    for (std::size_t i = 0; i <= hypothesis.tokens.size(); ++i) {
      from_left += static_cast<double>(left[i]);
      if (right) from_right += static_cast<double>(right[i]);
      if (i == hypothesis.tokens.size()) break;
      double sum = std::exp(static_cast<double>(left[i])) + hypothesis.probabilities[i];
      if (right) sum += std::exp(static_cast<double>(right[i]));
      probabilities.push_back(sum / (right ? 3 : 2));
    }
    const double attention = right ? (1 - reverse_weight) * from_left + reverse_weight * from_right : from_left;
    const double score = attention + ctc_weight * (hypothesis.score - hypothesis.context_score) + hypothesis.context_score;
    ranked.push_back({std::move(hypothesis), score, std::move(probabilities)});
  }
  const auto better = [](const Ranked& one, const Ranked& other) { return one.score > other.score; };
  std::stable_sort(ranked.begin(), ranked.end(), better);
  return ranked;
}

inline double rounded(double seconds) { return std::round(seconds * 1000) / 1000; }

// Words of the best hypothesis of an utterance that begins at encoder frame `start` and has `num_frames`.
inline std::vector<Word> words_of(const Manifest& m, const Vocabulary& vocabulary, const Ranked& best, std::int64_t start,
                                  std::int64_t num_frames, const std::vector<Seconds>& pauses) {
  const std::vector<int>& times = best.hypothesis.times;
  const double frame_s = m.frame_s(), begin = static_cast<double>(start) * frame_s;
  const auto token_start = [&](std::size_t i) {
    const double half = i ? (times[i - 1] + times[i]) / 2.0 * frame_s : 0;
    return std::max(times[i] * frame_s - 0.5, half);
  };
  const auto token_end = [&](std::size_t i) {
    const double duration = static_cast<double>(num_frames) * frame_s;
    const double half = i + 1 < times.size() ? (times[i] + times[i + 1]) / 2.0 * frame_s : duration;
    return std::min(times[i] * frame_s + 0.5, half);
  };
  const std::vector<WordSpan> spans = vocabulary.words(best.hypothesis.tokens);
  std::vector<Seconds> meeting, peaks;
  for (const WordSpan& word : spans) {
    meeting.emplace_back(begin + token_start(word.begin), begin + token_end(word.end - 1));
    peaks.emplace_back(begin + times[word.begin] * frame_s, begin + times[word.end - 1] * frame_s);
  }
  end_at_pauses(meeting, peaks, pauses);
  std::vector<Word> words;
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const auto first = best.probabilities.begin();
    double confidence = *std::min_element(first + static_cast<std::ptrdiff_t>(spans[i].begin), first + static_cast<std::ptrdiff_t>(spans[i].end));
    if (m.calibrated) {
      const double clipped = std::clamp(confidence, 1e-6, 1 - 1e-6);
      const double odds = m.scale * std::log(clipped / (1 - clipped)) + m.bias;
      confidence = 1 / (1 + std::exp(-std::clamp(odds, -700.0, 700.0)));
    }
    words.push_back({spans[i].text, rounded(meeting[i].first), rounded(meeting[i].second), confidence});
  }
  return words;
}

}  // namespace u2moe
