// Recognises one audio source. With a voice activity detector, each speech segment is recognised as a separate source. Segments
// are found from the speech probabilities of the detector's network, as in runtime/decoding/vad.py.
#pragma once

#include "recognition.hpp"
#include "resampler.hpp"

namespace u2moe::runtime {

/// See u2moe_vad_options.
struct VadOptions : VadNumbers {
  /// @throws InvalidArgument if an option is out of range.
  void check() const {
    check_numbers<VadNumbers>(*this);
    check_range("threshold", threshold, 0, 1 - 1e-9);
    check_range("end_threshold", end_threshold, 0, threshold);
    check_range("padding", padding, 0, min_silence / 2);
  }
};

/// Part of a speech segment. It starts at sample `start` of the source.
struct Speech {
  std::size_t start;
  std::vector<float> samples;
  bool begins, ends;
};

/// Finds the speech segments of a source, and pads them. The result does not depend on how samples are split across
/// calls. The caller runs the network and passes the probability of each window.
class SpeechFinder {
 public:
  static constexpr int kRate = 16000;
  static constexpr std::size_t kWindow = 512;  ///< samples for one probability

  explicit SpeechFinder(const VadOptions& options)
      : options_(options), min_silent_(static_cast<std::size_t>(std::ceil(options.min_silence / (static_cast<double>(kWindow) / kRate)))),
        padding_(static_cast<std::size_t>(std::nearbyint(options.padding * kRate))) {}

  /// Append samples at 16 kHz.
  void accept(const std::vector<float>& samples) { held_.insert(held_.end(), samples.begin(), samples.end()); }
  /// End the source, and fill its last window with silence.
  void finish() {
    const std::size_t rest = (held_start_ + held_.size() - heard_) % kWindow;
    if (rest) held_.resize(held_.size() + kWindow - rest);
    is_finished_ = true;
  }

  /// Next window that has no speech probability yet; null if the remaining samples do not fill a window.
  const float* window() const {
    return held_start_ + held_.size() - heard_ >= kWindow ? held_.data() + (heard_ - held_start_) : nullptr;
  }

  /// Set the speech probability of the window that `window` returns.
  void hear(double probability) {
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

  /// Take the next part of a speech segment.
  std::optional<Speech> take() {
    if (found_.empty() && is_finished_ && speaks_ && !window()) add_part(std::min(spoken_ + padding_, heard_), true);
    if (found_.empty()) return std::nullopt;
    std::optional<Speech> first = std::move(found_.front());
    found_.pop_front();
    return first;
  }

 private:
  void add_part(std::size_t end, bool ends) {
    const auto at = [this](std::size_t sample) { return held_.begin() + static_cast<std::ptrdiff_t>(sample - held_start_); };
    found_.push_back({given_, {at(given_), at(end)}, begins_, ends});
    given_ = end;
    begins_ = false;
    speaks_ = !ends;
  }

  VadOptions options_;
  std::vector<float> held_;                          // samples that may still be returned, then samples without a probability
  std::size_t held_start_ = 0, heard_ = 0;           // indices of the first held sample, and of the first without a probability
  std::size_t given_ = 0, spoken_ = 0;               // ends: of the samples returned or dropped; of the last speech window
  std::size_t num_silent_ = 0, min_silent_, padding_;
  bool speaks_ = false, begins_ = false, is_finished_ = false;
  std::deque<Speech> found_;
};

/// The beginning or end of speech, `time` seconds after the first sample of the source.
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

/// State of a stream. The caller runs the graphs: `next` returns the next graph to run, and `give` takes its output. The
/// manifest and the vocabulary must outlive the state.
class StreamState {
 public:
  /// @param vad options of the voice activity detector. None: all samples are recognised.
  /// @throws InvalidArgument or StreamError if an option is out of range or not supported by the bundle.
  StreamState(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options, const std::optional<VadOptions>& vad)
      : manifest_(&manifest), vocabulary_(&vocabulary), recognition_(manifest, vocabulary, options) {
    if (!vad) return;
    vad->check();
    if (manifest.sample_rate != SpeechFinder::kRate) {
      fail<InvalidArgument>("a voice activity detector needs audio at 16000 Hz, but the model's is " + std::to_string(manifest.sample_rate) + " Hz");
    }
    finder_.emplace(*vad);
  }

  const StreamOptions& options() const { return recognition_.options(); }  ///< all options, with values from the bundle

  /// Append mono samples, a few seconds at most, always at the rate of the first call. Their split does not affect results.
  /// @throws AudioError for an invalid rate or invalid samples. In this case, no samples are appended.
  void accept(int sample_rate, const float* samples, std::size_t num) {
    check_audio(resampler_ ? resampler_->source_rate() : 0, sample_rate, samples, num);
    if (!resampler_) resampler_.emplace(sample_rate, manifest_->sample_rate);
    append(resampler_->accept(samples, num));
  }

  /// Finish the input.
  void finish() {
    if (resampler_) append(resampler_->finish());
    if (finder_) finder_->finish();
    else recognition_.finish();
    is_finished_ = true;
  }

  /// Return the next graph to run, or nothing if more samples are needed or the input has ended.
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
        recognition_.finish();  // no speech was found
      } else {
        return std::nullopt;
      }
    }
  }

  /// Pass the output of the graph that `next` requested: encoder output [time, dim], log-probabilities [time, vocab], or the
  /// probability of speech.
  void give(Floats output) {
    if (window_.empty()) return recognition_.give(std::move(output));
    window_.clear();
    finder_->hear(static_cast<double>(output.at(0)));
  }

  void give(const TokenScores& scores) { recognition_.give(scores); }

  /// Take the final result of the next utterance that has words. Each result is returned once.
  std::optional<Result> take_segment() { return take_first(segments_); }

  /// Take the next event of the voice activity detector. Each event is returned once.
  std::optional<SpeechEvent> take_speech_event() { return take_first(speech_events_); }

  /// Partial result of the current utterance. After the end of the input, the result is final and may be empty.
  Result result() const { return presented(recognition_.result()); }

 private:
  void append(Floats samples) {
    if (finder_) finder_->accept(samples);
    else recognition_.accept(std::move(samples));
  }

  void recognize(const Speech& speech) {
    const auto end = static_cast<double>(speech.start + speech.samples.size()) / SpeechFinder::kRate;
    if (speech.begins) {
      speech_events_.push_back({true, static_cast<double>(speech.start) / SpeechFinder::kRate});
      recognition_ = Recognition(*manifest_, *vocabulary_, options());
      begin_s_ = static_cast<double>(speech.start) / SpeechFinder::kRate;
      first_ = number_;
    }
    recognition_.accept(speech.samples);
    if (!speech.ends) return;
    recognition_.finish();
    speech_events_.push_back({false, end});
  }

  // Return a result of the current speech segment, with its times and `segment` counted from the start of the source.
  Result presented(Result result) const {
    result.segment += first_;
    return timed(std::move(result), [this](double time) { return rounded(time + begin_s_); });
  }

  const Manifest* manifest_;
  const Vocabulary* vocabulary_;
  Recognition recognition_;  // of the whole source, or of the current speech segment
  std::optional<Resampler> resampler_;
  std::optional<SpeechFinder> finder_;
  Floats window_;                       // window whose probability is requested; empty: none
  bool is_finished_ = false;
  double begin_s_ = 0;            // start of the current speech segment in seconds
  int first_ = 0, number_ = 0;    // index of the first utterance in the speech segment, and of the next utterance
  std::deque<Result> segments_;
  std::deque<SpeechEvent> speech_events_;
};

}  // namespace u2moe::runtime
