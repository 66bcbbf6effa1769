#include "endpoint.hpp"

#include <cmath>
#include <limits>

#include "pauses.hpp"

namespace u2moe::runtime {

Endpointer::Endpointer(const EndpointRules& rules, double frame_s, int blank) : blank_(blank) {
  const auto frames = [frame_s](double seconds) {
    constexpr int never = std::numeric_limits<int>::max();
    // 1.2 s of 40 ms is 30 frames although 30 * 0.04 < 1.2 in floating point
    const double count = std::ceil(std::round(seconds / frame_s * 1e6) / 1e6);
    return count < never ? static_cast<int>(count) : never;
  };
  for (const std::optional<EndpointRule>& rule : rules) {
    if (!rule) continue;
    rules_.push_back({rule->must_contain_nonsilence, frames(rule->min_trailing_silence), frames(rule->min_utterance_length)});
  }
}

void Endpointer::reset() {
  num_frames_ = num_silent_ = 0;
  has_speech_ = false;
}

std::optional<Endpoint> Endpointer::advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
  static const double silence_log_prob = std::log(0.8);
  for (std::size_t index = 0; index < num_frames; ++index) {
    const bool silent = static_cast<double>(log_probs[index * vocab_size + static_cast<std::size_t>(blank_)]) > silence_log_prob;
    ++num_frames_;
    num_silent_ = silent ? num_silent_ + 1 : 0;
    has_speech_ |= !silent;
    for (const Rule& rule : rules_) {
      if (num_silent_ >= rule.silence && num_frames_ >= rule.length && (has_speech_ || !rule.needs_speech)) {
        return Endpoint{index + 1, num_silent_};
      }
    }
  }
  return std::nullopt;
}

std::optional<std::size_t> PauseRule::end_of_window(const std::vector<float>& levels, std::size_t start, bool is_full, bool is_last) {
  pause_len_ = 0;
  is_long_ |= is_full;
  if (min_pause_ <= 0 || !is_long_) return std::nullopt;
  const double after = (static_cast<double>(rejected_until_) - static_cast<double>(start)) * frame_s_;
  const std::optional<Seconds> pause = first_pause(levels, level_s_, min_pause_, after);
  if (!pause || (is_last && pause->second >= static_cast<double>(levels.size()) * level_s_)) return std::nullopt;
  pause_len_ = static_cast<std::int64_t>((pause->second - pause->first) / frame_s_);
  return static_cast<std::size_t>((pause->first + pause->second) / 2 / frame_s_);
}

std::optional<Endpoint> PauseRule::endpoint(std::size_t num_frames, int trailing_silence) {
  constexpr double silent_before_cut_s = 0.12;  // a pause with a token this close before its middle is quiet speech
  const std::int64_t pause_len = pause_len_;
  pause_len_ = 0;
  if (!pause_len) return std::nullopt;
  if (trailing_silence * frame_s_ < silent_before_cut_s) {
    rejected_until_ = num_frames;
    return std::nullopt;
  }
  return Endpoint{0, pause_len};
}

}  // namespace u2moe::runtime
