// One source of audio: samples in, partial and final results out.
#pragma once

#include <future>
#include <memory>
#include <optional>

#include "graphs.hpp"
#include "source.hpp"
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
  /// @param vad each stretch of speech that it finds is a source of its own; null: all samples are one.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options, std::shared_ptr<const Vad> vad);

  /// Append samples of one channel, in [-1, 1], and recognise what is complete. Any split gives the same results.
  /// @throws AudioError a rate or samples that cannot be used; nothing is appended.
  /// @throws StreamError the input is finished, or recognition has failed before.
  void accept_waveform(int sample_rate, const float* samples, std::size_t num);

  /// Finish the input, and recognise the rest.
  void input_finished();

  /// Final results of utterances that have words, each once.
  std::optional<Result> take_segment() { return source_.take_segment(); }
  bool has_segments() const { return source_.has_segments(); }

  /// The result so far of the current utterance; final and perhaps empty after the end of the input.
  Result result() const { return source_.result(); }

  /// Discard everything and begin a new source.
  void reset() { *this = Stream(model_, source_.options(), vad_); }

 private:
  void check_usable() const;
  void decode();
  Floats encode(const Request& request);

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Vad> vad_;
  Source source_;
  Caches caches_;
  Vad::Past past_;
  bool has_failed_ = false, is_finished_ = false;
};

}  // namespace u2moe::runtime
