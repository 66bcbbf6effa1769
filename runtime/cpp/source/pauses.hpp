// Quiet stretches of audio, and words that end there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace u2moe::runtime {

using Seconds = std::pair<double, double>;  ///< start and end

/// Quiet stretches of an utterance with these levels, in seconds from its first frame.
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

/// The first pause after some audio that lasts at least `min_pause_s` and has its middle after `after_s`.
inline std::optional<Seconds> first_pause(const std::vector<float>& levels, double frame_s, double min_pause_s, double after_s) {
  constexpr double min_before_s = 0.2;  // before that there is nothing to cut off
  for (const Seconds& pause : find_pauses(levels, frame_s)) {
    const auto [start, end] = pause;
    if (end - start >= min_pause_s - 1e-9 && start >= min_before_s && (start + end) / 2 > after_s) return pause;
  }
  return std::nullopt;
}

/// Words end where the longest pause between two peaks begins, and the next word begins where it ends.
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

}  // namespace u2moe::runtime
