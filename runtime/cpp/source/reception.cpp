#include "reception.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pauses.hpp"

namespace u2moe::runtime {
namespace {

template <class T>
void drop(std::vector<T>& items, std::size_t num) {
  items.erase(items.begin(), items.begin() + static_cast<std::ptrdiff_t>(std::min(num, items.size())));
}

}  // namespace

Reception::Reception(const Manifest& manifest, int chunk_size, bool knows_last, double padding_s)
    : m_(&manifest), rate_(static_cast<std::size_t>(manifest.subsampling_rate)),
      stride_(static_cast<std::size_t>(chunk_size) * rate_),
      shortest_(static_cast<std::size_t>(manifest.right_context) + 1),
      length_(stride_ - rate_ / static_cast<std::size_t>(manifest.frame_reduction) + shortest_),
      needed_(knows_last ? stride_ + shortest_ : length_), padding_(padding_s, manifest) {}

void Reception::finish() {
  if (resampler_) append(resampler_->finish());
  hear(padding_.finish());
  is_finished_ = true;
}

double Reception::lead_s() const {
  const auto rate = static_cast<std::size_t>(m_->sample_rate);
  return static_cast<double>((padding_.num_before() * 1000 + rate / 2) / rate) / 1000;
}

double Reception::end_s() const { return static_cast<double>(num_received_ * 1000 / static_cast<std::size_t>(m_->sample_rate)) / 1000; }

bool Reception::has_window() const { return num_frames() >= next_ + (is_finished_ ? shortest_ : needed_); }

Floats Reception::take_window() {
  const std::size_t end = std::min(next_ + length_, num_frames());
  begin_ = next_;
  end_ = end;
  next_ = begin_ + stride_;
  trim();
  if (end <= num_computed_) return {};
  const auto shift = static_cast<std::size_t>(m_->shift_len());
  const auto first = samples_.begin() + static_cast<std::ptrdiff_t>(num_computed_ * shift - first_sample_);
  const std::size_t num = (end - 1 - num_computed_) * shift + static_cast<std::size_t>(m_->frame_len());
  Floats added(first, first + static_cast<std::ptrdiff_t>(num));
  num_computed_ = end;
  const std::size_t used = std::min(end * shift - first_sample_, samples_.size());  // no later frame needs these
  drop(samples_, used);
  first_sample_ += used;
  return added;
}

void Reception::add_features(const Floats& added) {
  features_.insert(features_.end(), added.begin(), added.end());
  const std::vector<float> measured = loudness(added, *m_);
  levels_.insert(levels_.end(), measured.begin(), measured.end());
  trim();
}

// Forget the features before the last window.
void Reception::trim() {
  const auto bins = static_cast<std::size_t>(m_->feature_size);
  const std::size_t num = std::min(begin_ - first_feature_, features_.size() / bins);
  drop(features_, num * bins);
  first_feature_ += num;
}

Floats Reception::window() const {
  return {features_.begin(), features_.begin() + static_cast<std::ptrdiff_t>((end_ - begin_) * static_cast<std::size_t>(m_->feature_size))};
}

std::size_t Reception::num_window_frames() const { return (end_ - begin_ - shortest_) / rate_ + 1; }

void Reception::shorten_window(std::size_t num) {
  next_ = begin_ + num * rate_;
  end_ = std::min(end_, begin_ + num * rate_ + length_ - stride_);
}

void Reception::repeat_window(std::size_t num) { next_ = begin_ + (num_window_frames() - num) * rate_; }

std::vector<float> Reception::levels(std::size_t num) const {
  return {levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(std::min(levels_.size(), num))};
}

void Reception::forget(std::size_t start) {
  const std::size_t first = start * rate_;
  drop(levels_, first - levels_start_);
  levels_start_ = first;
}

void Reception::append(Floats samples) {
  num_received_ += samples.size();
  hear(padding_.accept(std::move(samples)));
}

// Feature frames of all samples so far.
std::size_t Reception::num_frames() const {
  const std::size_t num = first_sample_ + samples_.size();
  const auto frame = static_cast<std::size_t>(m_->frame_len()), shift = static_cast<std::size_t>(m_->shift_len());
  return num < frame ? 0 : 1 + (num - frame) / shift;
}

}  // namespace u2moe::runtime
