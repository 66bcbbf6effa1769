// Final results: scores of both passes, word times moved to pauses in the audio, and confidences.
#pragma once

#include "ctc.hpp"
#include "manifest.hpp"

namespace u2moe::runtime {

struct Word {
  std::string text;
  double start, end;  ///< seconds after the first sample of the stream
  double confidence;  ///< 0 to 1; calibrated if the bundle has a calibration
};

struct Alternative {
  std::string text;
  std::vector<int> tokens;
  double score, ctc_score, attention_score, language_score;
  std::vector<double> times;  ///< time of each token's peak in seconds; empty for hypotheses without times
};

/// A result. Partial results have only text, tokens, times, committed words and phrases, all from the first pass.
struct Result {
  std::string text;
  bool is_final = false;
  int segment = 0;  ///< index of the utterance, counting only utterances with words
  double start = 0, end = 0, confidence = 0;
  double score = 0;  ///< score of the best alternative
  std::vector<int> tokens;
  std::vector<double> times;  ///< time of each token's peak in seconds
  std::vector<Word> words;
  std::vector<Alternative> nbest;  ///< best first
  std::string committed;           ///< prefix of the text that no later partial result changes; the whole text if final
  int num_committed = 0;           ///< number of words in `committed`
  double committed_end = 0;        ///< time in seconds up to which the first pass makes no more changes
  int revised = 0;                 ///< in a final result, number of changes to committed words
  std::vector<Word> phrases;       ///< phrases of a grammar; in a partial result, only those that no later result removes
};

/// Return a result with all times converted by `clock`, a function from seconds to seconds.
template <class Clock>
Result timed(Result result, Clock clock) {
  for (double& time : result.times) time = clock(time);
  for (Alternative& each : result.nbest) std::transform(each.times.begin(), each.times.end(), each.times.begin(), clock);
  result.committed_end = clock(result.committed_end);
  for (std::vector<Word>* all : {&result.words, &result.phrases}) {
    for (Word& word : *all) word.start = clock(word.start), word.end = clock(word.end);
  }
  if (result.is_final && !result.text.empty()) result.start = clock(result.start), result.end = clock(result.end);
  return result;
}

/// Result as JSON, with the field names of the Python class.
inline std::string as_json(const Result& result) {
  const auto named = [](const char* name, const Word& each) {
    return "{\"" + std::string(name) + "\": " + json_text(each.text) + ", \"start\": " + json_text(each.start) + ", \"end\": " + json_text(each.end) +
           ", \"confidence\": " + json_text(each.confidence) + "}";
  };
  const auto word = [&](const Word& each) { return named("word", each); };
  const auto phrase = [&](const Word& each) { return named("phrase", each); };
  const auto alternative = [](const Alternative& each) {
    return "{\"text\": " + json_text(each.text) + ", \"tokens\": " + json_text(each.tokens) + ", \"times\": " + json_text(each.times) + ", \"score\": " + json_text(each.score) +
           ", \"ctc_score\": " + json_text(each.ctc_score) + ", \"attention_score\": " + json_text(each.attention_score) +
           ", \"language_score\": " + json_text(each.language_score) + "}";
  };
  return "{\"text\": " + json_text(result.text) + ", \"is_final\": " + (result.is_final ? "true" : "false") + ", \"segment\": " +
         std::to_string(result.segment) + ", \"start\": " + json_text(result.start) + ", \"end\": " + json_text(result.end) +
         ", \"confidence\": " + json_text(result.confidence) + ", \"score\": " + json_text(result.score) + ", \"tokens\": " + json_text(result.tokens) + ", \"times\": " +
         json_text(result.times) + ", \"words\": " + json_list(result.words, word) + ", \"nbest\": " + json_list(result.nbest, alternative) +
         ", \"committed\": " + json_text(result.committed) + ", \"num_committed\": " + std::to_string(result.num_committed) +
         ", \"committed_end\": " + json_text(result.committed_end) + ", \"revised\": " + std::to_string(result.revised) + ", \"phrases\": " +
         json_list(result.phrases, phrase) + "}";
}

/// Log-probabilities [hypotheses, width] that the two decoders give to the tokens and eos. `right` is empty if there is no
/// right-to-left decoder. `next` has the left-to-right decoder's log-probabilities [hypotheses, vocab] of the next token.
struct TokenScores {
  Floats left, right;
  std::size_t width = 0;
  Floats next;
};

struct Ranked {
  Hypothesis hypothesis;
  double score, attention_score;
  std::vector<double> probabilities;  ///< of each token: mean over the decoders and, if available, the CTC output
  std::size_t place = 0;              ///< index among the hypotheses of the first pass
};

/// Rank hypotheses, best first. The score is (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left
/// + ctc_weight * ctc + hotword bonus + rescoring_weight * language.
inline std::vector<Ranked> attention_rescoring(std::vector<Hypothesis> hypotheses, const TokenScores& scores, const StreamNumbers& weights,
                                               double rescoring_weight) {
  std::vector<Ranked> ranked;
  const bool uses_right = !scores.right.empty() && weights.reverse_weight > 0;
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
      const bool has_own = !hypothesis.probabilities.empty();
      double sum = std::exp(static_cast<double>(left[i])) + (has_own ? hypothesis.probabilities[i] : 0);
      if (right) sum += std::exp(static_cast<double>(right[i]));
      probabilities.push_back(sum / ((right ? 2 : 1) + (has_own ? 1 : 0)));
    }
    const double attention = right ? (1 - weights.reverse_weight) * from_left + weights.reverse_weight * from_right : from_left;
    const double acoustic = hypothesis.score - hypothesis.context_score - hypothesis.language_score;
    const double score = attention + weights.ctc_weight * acoustic + hypothesis.context_score + rescoring_weight * hypothesis.language_score;
    ranked.push_back({std::move(hypothesis), score, attention, std::move(probabilities), row});
  }
  const auto better = [](const Ranked& one, const Ranked& other) { return one.score > other.score; };
  std::stable_sort(ranked.begin(), ranked.end(), better);
  return ranked;
}

/// Minimum number of words to replace, remove or add so that `words` become the first words of `revised`.
inline int num_revised(const std::vector<WordSpan>& words, const std::vector<WordSpan>& revised) {
  std::vector<int> row(revised.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (std::size_t number = 1; number <= words.size(); ++number) {
    int diagonal = std::exchange(row[0], static_cast<int>(number));
    for (std::size_t column = 1; column < row.size(); ++column) {
      const int differs = words[number - 1].text == revised[column - 1].text ? 0 : 1;
      const int least = std::min({row[column] + 1, row[column - 1] + 1, diagonal + differs});
      diagonal = std::exchange(row[column], least);
    }
  }
  return *std::min_element(row.begin(), row.end());
}

inline double rounded(double seconds) { return std::round(seconds * 1000) / 1000; }

/// Confidence of a word. `probability` is the lowest probability of its tokens.
inline double calibrated(const Manifest& m, double probability) {
  if (!m.calibrated) return probability;
  const double clipped = std::clamp(probability, 1e-6, 1 - 1e-6);
  const double odds = m.scale * std::log(clipped / (1 - clipped)) + m.bias;
  return 1 / (1 + std::exp(-std::clamp(odds, -700.0, 700.0)));
}

/// Words of the best hypothesis of an utterance. The utterance has `num_frames` encoder frames, beginning with frame `start`.
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
    const double least = *std::min_element(first + static_cast<std::ptrdiff_t>(spans[i].begin), first + static_cast<std::ptrdiff_t>(spans[i].end));
    words.push_back({spans[i].text, rounded(meeting[i].first), rounded(meeting[i].second), calibrated(m, least)});
  }
  return words;
}

/// Format a result as written English: capital letters, and digits for numbers, times, dates and money. Texts with Chinese or
/// Japanese characters do not change, nor do tokens, times and scores. In a partial result, words remain committed if their
/// written form cannot change. `vocabulary` is the vocabulary of the result. Implemented in written_text.cpp.
Result written(Result result, const Vocabulary& vocabulary);

}  // namespace u2moe::runtime
