// One source of audio: samples in, partial and final results out.
#pragma once

#include <algorithm>
#include <future>
#include <memory>
#include <optional>
#include <utility>

#include "errors.hpp"
#include "graphs.hpp"
#include "stream_state.hpp"
#include "vad.hpp"

namespace u2moe::runtime {

/// A bundle and its sessions. Immutable: threads may share it.
struct Model {
  Model(Location location, Settings chosen)
      : settings(std::move(chosen)), bundle(std::move(location)), reading(std::async([this] { return bundle.language_model(); })),
        graphs(bundle, settings), hotwords(bundle.hotwords()), language_model(reading.get()) {}

  const Settings settings;
  const Bundle bundle;
  std::future<std::shared_ptr<const Fusion>> reading;  ///< of the language model, while sessions start
  const Graphs graphs;
  const std::shared_ptr<const ContextGraph> hotwords;  ///< the bundle's; null: none
  const std::shared_ptr<const Fusion> language_model;  ///< the bundle's; null: none
};

/// Not thread-safe; different streams of one model may run in different threads. Keeps the model alive. After an error during
/// recognition audio is lost, and another stream must take its place.
class Stream {
 public:
  /// @param vad each speech segment that it finds is a source of its own; null: all samples are one.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options, std::shared_ptr<const Vad> vad)
      : model_(std::move(model)), vad_(std::move(vad)),
        source_(model_->bundle.manifest(), model_->bundle.vocabulary(), options, vad_ ? std::optional(vad_->options()) : std::nullopt) {
    if (vad_) past_ = vad_->start();
  }

  /// Append samples of one channel, in [-1, 1], and recognise what is complete. Any split gives the same results.
  /// @throws AudioError a rate or samples that cannot be used; nothing is appended.
  /// @throws StreamError the input is finished, or recognition has failed before.
  void accept_waveform(int sample_rate, const float* samples, std::size_t num) {
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

  /// Finish the input, and recognise the rest.
  void input_finished() {
    check_usable();
    has_failed_ = true;
    source_.finish();
    decode();
    has_failed_ = false;
    is_finished_ = true;
  }

  /// Final results of utterances that have words, each once.
  std::optional<Result> take_segment() { return source_.take_segment(); }
  bool has_segments() const { return source_.has_segments(); }

  /// The result so far of the current utterance; final and perhaps empty after the end of the input.
  Result result() const { return source_.result(); }

  /// Discard everything and begin a new source.
  void reset() { *this = Stream(model_, source_.options(), vad_); }

 private:
  void check_usable() const {
    if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
    if (is_finished_) throw StreamError("the input of this stream is finished: reset it, or create another");
  }

  // All work that is ready.
  void decode() {
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

  Floats encode(const Request& request) {
    if (request.begins) caches_ = model_->graphs.start();
    if (request.kept >= 0) {
      caches_.offset = request.kept;
      model_->graphs.keep_last(caches_, request.kept);
    }
    return model_->graphs.encode(*request.input, caches_, request.required);
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Vad> vad_;
  StreamState source_;
  Caches caches_;
  Vad::Past past_;
  bool has_failed_ = false, is_finished_ = false;
};

}  // namespace u2moe::runtime
