// One source of audio: with a voice activity detector each speech segment is recognised as a source of its own.
#pragma once

#include "errors.hpp"
#include "recognition.hpp"
#include "resampler.hpp"
#include "speech.hpp"

namespace u2moe::runtime {

/// Speech begins or ends, `time` seconds from the first sample of the source.
struct SpeechEvent {
  bool is_speech;
  double time;
};

template <class Item>
std::optional<Item> take_first(std::deque<Item>& items) {
  if (items.empty()) return std::nullopt;
  std::optional<Item> first = std::move(items.front());
  items.pop_front();
  return first;
}

/// Whoever has the graphs asks which is next, and gives its output. The manifest and the vocabulary must outlive it.
class StreamState {
 public:
  /// @param vad none: all samples are recognised.
  /// @throws InvalidArgument, StreamError an option is out of range, or the bundle does not support it.
  StreamState(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options, const std::optional<VadOptions>& vad)
      : manifest_(&manifest), vocabulary_(&vocabulary), recognition_(manifest, vocabulary, options) {
    if (!vad) return;
    vad->check();
    if (manifest.sample_rate != SpeechFinder::kRate) {
      fail<InvalidArgument>("a voice activity detector needs audio at 16000 Hz, the model's is " + std::to_string(manifest.sample_rate) + " Hz");
    }
    finder_.emplace(*vad);
  }

  const StreamOptions& options() const { return recognition_.options(); }  ///< with definite values

  /// Checks samples of one channel before any is appended.
  /// @throws AudioError a rate or samples that cannot be used.
  void check(int sample_rate, const float* samples, std::size_t num) {
    if (finder_) check_audio(resampler_, sample_rate, SpeechFinder::kRate, samples, num);
    else recognition_.check(sample_rate, samples, num);
  }

  /// Appends checked samples, at most some seconds. Any split gives the same results.
  void accept(const float* samples, std::size_t num) {
    if (finder_) finder_->accept(resampler_->accept(samples, num));
    else recognition_.accept(samples, num);
  }

  /// Finish the input.
  void finish() {
    if (resampler_) finder_->accept(resampler_->finish());
    if (finder_) finder_->finish();
    else recognition_.finish();
    is_finished_ = true;
  }

  /// The graph to run next; none: more samples are needed, or the end of the input.
  std::optional<Request> next() {
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

  /// The output of the graph of `next`: features [frames, mel], encoder output [time, dim], log-probabilities [time, vocab], or
  /// the probability of speech.
  void give(Floats output) {
    if (window_.empty()) return recognition_.give(std::move(output));
    window_.clear();
    finder_->hear(static_cast<double>(output.at(0)));
  }

  void give(const TokenScores& scores) { recognition_.give(scores); }

  /// Final results of utterances that have words, each once.
  std::optional<Result> take_segment() { return take_first(segments_); }

  /// What the voice activity detector found, each once.
  std::optional<SpeechEvent> take_speech_event() { return take_first(speech_events_); }

  /// The result so far of the current utterance; final and perhaps empty after the end of the input.
  Result result() const { return presented(recognition_.result()); }

 private:
  void recognize(const Speech& speech) {
    const auto end = static_cast<double>(speech.start + speech.samples.size()) / SpeechFinder::kRate;
    if (speech.begins) {
      speech_events_.push_back({true, static_cast<double>(speech.start) / SpeechFinder::kRate});
      recognition_ = Recognition(*manifest_, *vocabulary_, options());
      begin_s_ = static_cast<double>(speech.start) / SpeechFinder::kRate;
      first_ = number_;
    }
    recognition_.check(SpeechFinder::kRate, speech.samples.data(), speech.samples.size());
    recognition_.accept(speech.samples.data(), speech.samples.size());
    if (!speech.ends) return;
    recognition_.finish();
    speech_events_.push_back({false, end});
  }

  // A result of the current speech segment as one of the source.
  Result presented(Result result) const {
    result.segment += first_;
    return timed(std::move(result), [this](double time) { return rounded(time + begin_s_); });
  }

  const Manifest* manifest_;
  const Vocabulary* vocabulary_;
  Recognition recognition_;  // of all, or of the current speech segment
  std::optional<Resampler> resampler_;  // before the finder
  std::optional<SpeechFinder> finder_;
  Floats window_;                       // whose probability is asked for; empty: none
  bool is_finished_ = false;
  double begin_s_ = 0;            // of the current speech segment
  int first_ = 0, number_ = 0;    // of its segments, and of the next segment
  std::deque<Result> segments_;
  std::deque<SpeechEvent> speech_events_;
};

}  // namespace u2moe::runtime
