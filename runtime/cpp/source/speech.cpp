#include "speech.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "errors.hpp"

namespace u2moe::runtime {

void VadOptions::check() const {
  check_range("threshold", threshold, 1e-9, 1 - 1e-9);
  check_range("end_threshold", end_threshold, 1e-9, threshold);
  check_range("min_silence", min_silence, 1e-3, 1e6);
  check_range("padding", padding, 0, min_silence / 2);
}

SpeechFinder::SpeechFinder(const VadOptions& options)
    : options_(options), min_silent_(static_cast<std::size_t>(std::ceil(options.min_silence / (static_cast<double>(kWindow) / kRate)))),
      padding_(static_cast<std::size_t>(std::nearbyint(options.padding * kRate))) {}

void SpeechFinder::finish() {
  const std::size_t rest = (held_start_ + held_.size() - heard_) % kWindow;
  if (rest) held_.resize(held_.size() + kWindow - rest);
  is_finished_ = true;
}

const float* SpeechFinder::window() const {
  return held_start_ + held_.size() - heard_ >= kWindow ? held_.data() + (heard_ - held_start_) : nullptr;
}

void SpeechFinder::hear(double probability) {
  const bool goes_on = speaks_ && num_silent_ == 0;
  heard_ += kWindow;
  if (probability >= (goes_on ? options_.end_threshold : options_.threshold)) {
    if (!speaks_) {
      const std::size_t begin = heard_ - kWindow;
      given_ = std::max(given_, begin - std::min(begin, padding_));
      speaks_ = begins_ = true;
    }
    num_silent_ = 0;
    spoken_ = heard_;
    add_part(spoken_, false);
  } else if (++num_silent_ >= min_silent_ && speaks_) {
    add_part(spoken_ + padding_, true);
  }
  const std::size_t keep = speaks_ ? given_ : std::max(given_, heard_ - std::min(heard_, padding_));
  held_.erase(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(keep - held_start_));
  held_start_ = keep;
}

std::optional<Speech> SpeechFinder::take() {
  if (found_.empty() && is_finished_ && speaks_ && !window()) add_part(std::min(spoken_ + padding_, heard_), true);
  if (found_.empty()) return std::nullopt;
  std::optional<Speech> first = std::move(found_.front());
  found_.pop_front();
  return first;
}

void SpeechFinder::add_part(std::size_t end, bool ends) {
  const auto at = [this](std::size_t sample) { return held_.begin() + static_cast<std::ptrdiff_t>(sample - held_start_); };
  found_.push_back({given_, {at(given_), at(end)}, begins_, ends});
  given_ = end;
  begins_ = false;
  speaks_ = !ends;
}

}  // namespace u2moe::runtime
