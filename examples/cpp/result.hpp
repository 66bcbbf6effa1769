// Final results: scores of both passes, words that end at pauses in the audio, and their confidences.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "beam_search.hpp"
#include "bundle.hpp"
#include "graphs.hpp"

namespace u2moe {

using Seconds = std::pair<double, double>;  // start and end

struct Word {
  std::string text;
  double start, end, confidence;
};

struct Alternative {
  std::string text;
  std::vector<int> tokens;
  double score;
};

struct Result {
  std::string text;
  bool is_final;
  int segment;
  std::vector<int> tokens;
  std::vector<double> times;  // seconds at which each token peaks
  std::vector<Word> words;
  std::vector<Alternative> nbest;  // best first
};

struct Ranked {
  Hypothesis hypothesis;
  double score;
  std::vector<double> probabilities;  // of each token, averaged over the decoders and the CTC head
};

// score = (1 - reverse_weight) * left_to_right + reverse_weight * right_to_left + ctc_weight * ctc, best first.
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
    const double score = attention + ctc_weight * hypothesis.score;
    ranked.push_back({std::move(hypothesis), score, std::move(probabilities)});
  }
  const auto better = [](const Ranked& one, const Ranked& other) { return one.score > other.score; };
  std::stable_sort(ranked.begin(), ranked.end(), better);
  return ranked;
}

// Loudness of each frame of features [frames, mel], on the scale of log energy.
inline std::vector<float> loudness(const Floats& features, std::size_t num_bins) {
  std::vector<float> levels(features.size() / num_bins);
  for (std::size_t frame = 0; frame < levels.size(); ++frame) {
    double sum = 0;
    for (std::size_t bin = 0; bin < num_bins; ++bin) sum += std::exp(0.25 * static_cast<double>(features[frame * num_bins + bin]));
    levels[frame] = static_cast<float>(std::log(sum / static_cast<double>(num_bins)) / 0.25);
  }
  return levels;
}

// Quiet stretches in seconds from the first frame.
inline std::vector<Seconds> find_pauses(const std::vector<float>& levels, double frame_s) {
  if (levels.empty()) return {};
  std::vector<float> sorted = levels;
  std::sort(sorted.begin(), sorted.end());
  const auto percentile = [&sorted](double share) {
    const double place = share * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<std::size_t>(place);
    const double low = static_cast<double>(sorted[below]), high = static_cast<double>(sorted[std::min(below + 1, sorted.size() - 1)]);
    return low + (high - low) * (place - static_cast<double>(below));
  };
  const double loud = percentile(0.99), floor = std::max(percentile(0.1), loud - 12);
  const auto threshold = static_cast<float>(floor + 0.2 * (loud - floor));
  std::vector<Seconds> pauses;
  std::size_t start = 0;
  for (std::size_t frame = 0; frame <= levels.size(); ++frame) {
    if (frame < levels.size() && levels[frame] < threshold) continue;
    const double begin = static_cast<double>(start) * frame_s, end = static_cast<double>(frame) * frame_s;
    if (frame > start && end - begin >= 0.08 - 1e-9) pauses.emplace_back(begin, end);
    start = frame + 1;
  }
  return pauses;
}

// Words end where the longest pause between two peaks begins, and the next word begins where it ends.
inline void end_at_pauses(std::vector<Seconds>& words, const std::vector<Seconds>& peaks, const std::vector<Seconds>& pauses) {
  constexpr double far = std::numeric_limits<double>::infinity(), longest_token_s = 1;
  for (std::size_t place = 0; place <= words.size(); ++place) {
    const bool has_next = place < words.size();
    const double before = place ? peaks[place - 1].second : -far, after = has_next ? peaks[place].first : far;
    const double earliest = place ? words[place - 1].first : -far, latest = has_next ? words[place].second : far;
    const Seconds* best = nullptr;
    for (const Seconds& pause : pauses) {
      const auto& [start, end] = pause;
      if (end < before || start > after || start <= earliest || end >= latest) continue;
      if (!best || end - start > best->second - best->first) best = &pause;
    }
    if (!best) continue;
    if (place && best->first - std::max(before, earliest) <= longest_token_s) words[place - 1].second = best->first;
    if (has_next && after - best->second <= longest_token_s) {
      words[place].first = best->second;
    } else if (place && has_next) {
      words[place].first = std::max(words[place].first, words[place - 1].second);
    }
  }
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
