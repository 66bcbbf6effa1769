#include "result.hpp"

#include <algorithm>
#include <cstdio>

#include "json_text.hpp"

namespace u2moe::runtime {

std::string as_json(const Result& result) {
  const auto word = [](const Word& each) {
    return "{\"word\": " + json_text(each.text) + ", \"start\": " + json_text(each.start) + ", \"end\": " + json_text(each.end) +
           ", \"confidence\": " + json_text(each.confidence) + "}";
  };
  const auto alternative = [](const Alternative& each) {
    return "{\"text\": " + json_text(each.text) + ", \"tokens\": " + json_text(each.tokens) + ", \"score\": " + json_text(each.score) +
           ", \"ctc_score\": " + json_text(each.ctc_score) + ", \"attention_score\": " + json_text(each.attention_score) +
           ", \"language_score\": " + json_text(each.language_score) + "}";
  };
  return "{\"text\": " + json_text(result.text) + ", \"is_final\": " + (result.is_final ? "true" : "false") + ", \"segment\": " +
         std::to_string(result.segment) + ", \"start\": " + json_text(result.start) + ", \"end\": " + json_text(result.end) +
         ", \"confidence\": " + json_text(result.confidence) + ", \"tokens\": " + json_text(result.tokens) + ", \"times\": " +
         json_text(result.times) + ", \"words\": " + json_list(result.words, word) + ", \"nbest\": " + json_list(result.nbest, alternative) + "}";
}

std::vector<Ranked> attention_rescoring(std::vector<Hypothesis> hypotheses, const TokenScores& scores, double ctc_weight,
                                        double reverse_weight, double language_weight) {
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
    const double acoustic = hypothesis.score - hypothesis.context_score - hypothesis.language_score;
    const double score = attention + ctc_weight * acoustic + hypothesis.context_score + language_weight * hypothesis.language_score;
    ranked.push_back({std::move(hypothesis), score, attention, std::move(probabilities)});
  }
  const auto better = [](const Ranked& one, const Ranked& other) { return one.score > other.score; };
  std::stable_sort(ranked.begin(), ranked.end(), better);
  return ranked;
}

std::vector<Word> words_of(const Manifest& m, const Vocabulary& vocabulary, const Ranked& best, std::int64_t start,
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

}  // namespace u2moe::runtime
