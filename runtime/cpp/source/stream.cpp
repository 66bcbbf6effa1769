#include "stream.hpp"

#include <algorithm>
#include <utility>

#include "errors.hpp"

namespace u2moe::runtime {

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options)
    : model_(std::move(model)), recognition_(model_->bundle.manifest(), model_->bundle.vocabulary(), options), caches_(model_->graphs.start()) {}

void Stream::check_usable() const {
  if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
  if (recognition_.is_finished()) throw StreamError("the input of this stream is finished: reset it, or create another");
}

template <class Work>
void Stream::guarded(Work work) {
  has_failed_ = true;
  work();
  has_failed_ = false;
}

void Stream::accept_waveform(int sample_rate, const float* samples, std::size_t num) {
  check_usable();
  recognition_.check(sample_rate, samples, num);
  guarded([&] {
    // Seconds one by one, so that an hour takes no more memory, and no more time for each window, than a second.
    const auto second = static_cast<std::size_t>(sample_rate);
    for (std::size_t begin = 0; begin < num; begin += second) {
      recognition_.accept(samples + begin, std::min(second, num - begin));
      decode();
    }
  });
}

void Stream::input_finished() {
  check_usable();
  guarded([this] {
    recognition_.finish();
    decode();
  });
}

// All work that is ready.
void Stream::decode() {
  while (const std::optional<Request> request = recognition_.next()) {
    if (request->graph == Request::Graph::kFeatures) recognition_.give(model_->graphs.features(*request->input));
    if (request->graph == Request::Graph::kEncoder) recognition_.give(encode(*request));
    if (request->graph == Request::Graph::kCtc) recognition_.give(model_->graphs.ctc(*request->input));
    if (request->graph == Request::Graph::kDecoder) recognition_.give(model_->graphs.score(*request->input, *request->hypotheses));
  }
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
