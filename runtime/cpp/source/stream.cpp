#include "stream.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "errors.hpp"

namespace u2moe::runtime {

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options, std::shared_ptr<const Vad> vad)
    : model_(std::move(model)), recognition_(model_->bundle.manifest(), model_->bundle.vocabulary(), options), caches_(model_->graphs.start()),
      vad_(std::move(vad)) {
  if (!vad_) return;
  const int rate = model_->bundle.manifest().sample_rate;
  if (rate != SpeechFinder::kRate) throw InvalidArgument("a voice activity detector needs audio at 16000 Hz, the model's is " + std::to_string(rate) + " Hz");
  finder_.emplace(vad_->options());
  past_ = vad_->start();
}

void Stream::check_usable() const {
  if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
  if (is_finished_) throw StreamError("the input of this stream is finished: reset it, or create another");
}

template <class Work>
void Stream::guarded(Work work) {
  has_failed_ = true;
  work();
  has_failed_ = false;
}

void Stream::accept_waveform(int sample_rate, const float* samples, std::size_t num) {
  check_usable();
  if (finder_) check_audio(resampler_, sample_rate, SpeechFinder::kRate, samples, num);
  else recognition_.check(sample_rate, samples, num);
  guarded([&] {
    // Seconds one by one, so that an hour takes no more memory, and no more time for each window, than a second.
    const auto second = static_cast<std::size_t>(sample_rate);
    for (std::size_t begin = 0; begin < num; begin += second) {
      const std::size_t part = std::min(second, num - begin);
      if (finder_) {
        finder_->accept(resampler_->accept(samples + begin, part));
        listen();
      } else {
        recognition_.accept(samples + begin, part);
        decode();
      }
    }
  });
}

void Stream::input_finished() {
  check_usable();
  guarded([this] {
    if (resampler_) finder_->accept(resampler_->finish());
    if (finder_) {
      finder_->finish();
      listen();
    }
    if (!recognition_.is_finished()) recognition_.finish();
    decode();
    is_finished_ = true;
  });
}

std::optional<Result> Stream::take_segment() {
  if (segments_.empty()) return std::nullopt;
  std::optional<Result> first = std::move(segments_.front());
  segments_.pop_front();
  return first;
}

void Stream::listen() {
  while (const float* window = finder_->window()) finder_->hear(vad_->probability(window, past_));
  while (const std::optional<Speech> speech = finder_->take()) recognize(*speech);
}

void Stream::recognize(const Speech& speech) {
  if (speech.begins) {
    recognition_ = Recognition(model_->bundle.manifest(), model_->bundle.vocabulary(), recognition_.options());
    caches_ = model_->graphs.start();
    begin_s_ = static_cast<double>(speech.start) / SpeechFinder::kRate;
    first_ = number_;
  }
  recognition_.check(SpeechFinder::kRate, speech.samples.data(), speech.samples.size());
  recognition_.accept(speech.samples.data(), speech.samples.size());
  if (speech.ends) recognition_.finish();
  decode();
}

// All work that is ready.
void Stream::decode() {
  while (const std::optional<Request> request = recognition_.next()) {
    if (request->graph == Request::Graph::kFeatures) recognition_.give(model_->graphs.features(*request->input));
    if (request->graph == Request::Graph::kEncoder) recognition_.give(encode(*request));
    if (request->graph == Request::Graph::kCtc) recognition_.give(model_->graphs.ctc(*request->input));
    if (request->graph == Request::Graph::kDecoder) recognition_.give(model_->graphs.score(*request->input, *request->hypotheses));
  }
  while (std::optional<Result> segment = recognition_.take_segment()) {
    segments_.push_back(presented(std::move(*segment)));
    ++number_;
  }
}

// A result of the current stretch of speech as one of the stream.
Result Stream::presented(Result result) const {
  result.segment += first_;
  return timed(std::move(result), [this](double time) { return rounded(time + begin_s_); });
}

Floats Stream::encode(const Request& request) {
  const StreamOptions& options = recognition_.options();
  if (recognition_.has_full_context()) {
    Caches caches = model_->graphs.start();
    return model_->graphs.encode(*request.input, caches, 0);
  }
  if (request.kept >= 0) {
    caches_.offset = request.kept;
    model_->graphs.keep_last(caches_, request.kept);
  }
  const std::int64_t required = options.num_left_chunks < 0 ? -1 : std::int64_t{options.chunk_size} * options.num_left_chunks;
  return model_->graphs.encode(*request.input, caches_, required);
}

}  // namespace u2moe::runtime
