#include "stream.hpp"

#include <algorithm>
#include <utility>

#include "errors.hpp"

namespace u2moe::runtime {

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options, std::shared_ptr<const Vad> vad)
    : model_(std::move(model)), vad_(std::move(vad)),
      source_(model_->bundle.manifest(), model_->bundle.vocabulary(), options, vad_ ? std::optional(vad_->options()) : std::nullopt) {
  if (vad_) past_ = vad_->start();
}

void Stream::check_usable() const {
  if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
  if (is_finished_) throw StreamError("the input of this stream is finished: reset it, or create another");
}

void Stream::accept_waveform(int sample_rate, const float* samples, std::size_t num) {
  check_usable();
  source_.check(sample_rate, samples, num);
  has_failed_ = true;  // unless all is well until the end
  // Seconds one by one, so that an hour takes no more memory, and no more time for each window, than a second.
  const auto second = static_cast<std::size_t>(sample_rate);
  for (std::size_t begin = 0; begin < num; begin += second) {
    source_.accept(samples + begin, std::min(second, num - begin));
    decode();
  }
  has_failed_ = false;
}

void Stream::input_finished() {
  check_usable();
  has_failed_ = true;
  source_.finish();
  decode();
  has_failed_ = false;
  is_finished_ = true;
}

// All work that is ready.
void Stream::decode() {
  while (const std::optional<Request> request = source_.next()) {
    const Graphs& graphs = model_->graphs;
    switch (request->graph) {
      case Request::Graph::kFeatures: source_.give(graphs.features(*request->input)); break;
      case Request::Graph::kEncoder: source_.give(encode(*request)); break;
      case Request::Graph::kCtc: source_.give(graphs.ctc(*request->input)); break;
      case Request::Graph::kDecoder: source_.give(graphs.score(*request->input, *request->sequences)); break;
      case Request::Graph::kVad: source_.give({vad_->probability(request->input->data(), past_)}); break;
    }
  }
}

Floats Stream::encode(const Request& request) {
  if (request.begins) caches_ = model_->graphs.start();
  if (request.kept >= 0) {
    caches_.offset = request.kept;
    model_->graphs.keep_last(caches_, request.kept);
  }
  return model_->graphs.encode(*request.input, caches_, request.required);
}

}  // namespace u2moe::runtime
