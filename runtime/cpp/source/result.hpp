// Final results: scores of both passes, words that end at pauses in the audio, and their confidences.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "ctc.hpp"
#include "manifest.hpp"
#include "pauses.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

struct Word {
  std::string text;
  double start, end;  ///< seconds from the first sample of the stream
  double confidence;  ///< 0 to 1; calibrated if the bundle is
};

struct Alternative {
  std::string text;
  std::vector<int> tokens;
  double score, ctc_score, attention_score, language_score;
};

/// A partial result has text, tokens and times of the first pass only.
struct Result {
  std::string text;
  bool is_final = false;
  int segment = 0;  ///< number of the utterance among those with words
  double start = 0, end = 0, confidence = 0;
  std::vector<int> tokens;
  std::vector<double> times;  ///< seconds at which each token peaks
  std::vector<Word> words;
  std::vector<Alternative> nbest;  ///< best first
};

/// The result with times by another clock, a function from seconds to seconds.
template <class Clock>
Result timed(Result result, Clock clock) {
  for (double& time : result.times) time = clock(time);
  for (Word& word : result.words) word.start = clock(word.start), word.end = clock(word.end);
  if (result.is_final && !result.text.empty()) result.start = clock(result.start), result.end = clock(result.end);
  return result;
}

/// As JSON, with the names that Python's results have.
std::string as_json(const Result& result);

/// Log-probabilities of tokens and of eos [hypotheses, width] by both decoders, and from left to right those of each token as
/// the next [hypotheses, vocab]; right is empty without that decoder.
struct TokenScores {
  Floats left, right;
  std::size_t width = 0;
  Floats next;
};

struct Ranked {
  Hypothesis hypothesis;
  double score, attention_score;
  std::vector<double> probabilities;  ///< of each token, averaged over the decoders and the CTC head
};

/// score = (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left + ctc_weight * ctc + bonus
///       + language_weight * language, best first.
std::vector<Ranked> attention_rescoring(std::vector<Hypothesis> hypotheses, const TokenScores& scores, double ctc_weight,
                                        double reverse_weight, double language_weight);

inline double rounded(double seconds) { return std::round(seconds * 1000) / 1000; }

/// Words of the best hypothesis of an utterance that begins at encoder frame `start` and has `num_frames`.
std::vector<Word> words_of(const Manifest& m, const Vocabulary& vocabulary, const Ranked& best, std::int64_t start,
                           std::int64_t num_frames, const std::vector<Seconds>& pauses);

}  // namespace u2moe::runtime
