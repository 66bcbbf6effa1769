#include "source.hpp"

#include <string>
#include <utility>

#include "errors.hpp"

namespace u2moe::runtime {

Source::Source(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options, const std::optional<VadOptions>& vad)
    : manifest_(&manifest), vocabulary_(&vocabulary), recognition_(manifest, vocabulary, options) {
  if (!vad) return;
  vad->check();
  if (manifest.sample_rate != SpeechFinder::kRate) {
    fail<InvalidArgument>("a voice activity detector needs audio at 16000 Hz, the model's is " + std::to_string(manifest.sample_rate) + " Hz");
  }
  finder_.emplace(*vad);
}

void Source::check(int sample_rate, const float* samples, std::size_t num) {
  if (finder_) check_audio(resampler_, sample_rate, SpeechFinder::kRate, samples, num);
  else recognition_.check(sample_rate, samples, num);
}

void Source::accept(const float* samples, std::size_t num) {
  if (finder_) finder_->accept(resampler_->accept(samples, num));
  else recognition_.accept(samples, num);
}

void Source::finish() {
  if (resampler_) finder_->accept(resampler_->finish());
  if (finder_) finder_->finish();
  else recognition_.finish();
  is_finished_ = true;
}

std::optional<Request> Source::next() {
  for (;;) {
    std::optional<Request> request = recognition_.next();
    for (Result& segment : recognition_.take_segments()) {
      segments_.push_back(presented(std::move(segment)));
      ++number_;
    }
    if (request || !finder_) return request;
    if (const float* window = finder_->window()) {
      window_.assign(window, window + SpeechFinder::kWindow);
      return Request{Request::Graph::kVad, &window_};
    }
    if (const std::optional<Speech> speech = finder_->take()) {
      recognize(*speech);
    } else if (is_finished_ && !recognition_.is_finished()) {
      recognition_.finish();  // there was no speech
    } else {
      return std::nullopt;
    }
  }
}

void Source::give(Floats output) {
  if (window_.empty()) return recognition_.give(std::move(output));
  window_.clear();
  finder_->hear(static_cast<double>(output.at(0)));
}

std::optional<Result> Source::take_segment() {
  if (segments_.empty()) return std::nullopt;
  std::optional<Result> first = std::move(segments_.front());
  segments_.pop_front();
  return first;
}

void Source::recognize(const Speech& speech) {
  if (speech.begins) {
    recognition_ = Recognition(*manifest_, *vocabulary_, options());
    begin_s_ = static_cast<double>(speech.start) / SpeechFinder::kRate;
    first_ = number_;
  }
  recognition_.check(SpeechFinder::kRate, speech.samples.data(), speech.samples.size());
  recognition_.accept(speech.samples.data(), speech.samples.size());
  if (speech.ends) recognition_.finish();
}

// A result of the current stretch of speech as one of the source.
Result Source::presented(Result result) const {
  result.segment += first_;
  return timed(std::move(result), [this](double time) { return rounded(time + begin_s_); });
}

}  // namespace u2moe::runtime
