/// Speech recognition with a bundle of u2moe, in two passes, as audio comes: include this header.
///
///     u2moe::Recognizer recognizer("bundle");
///     u2moe::StreamOptions options;
///     options.hotwords = recognizer.hotwords({{"ada lovelace"}, {"kubernetes", 2.5}});
///     u2moe::Stream stream = recognizer.create_stream([](const u2moe::Result& result) { show(result); }, options);
///     stream.accept_waveform(48000, samples, num_samples);  // any number of samples, as often as there are some
///     stream.input_finished();
///
/// C++17, onnxruntime's C++ API and nothing else. The library prints nothing, keeps no global state and starts no thread
/// (onnxruntime starts some if `num_threads` is above 1). Errors are those of errors.hpp.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "stream.hpp"

namespace u2moe {

/// A bundle, loaded. Threads may share it: every function is const, and streams are independent of each other.
class Recognizer {
 public:
  /// @param folder a bundle, quantized or not; every file that is read is compared with its sha256.
  /// @param num_threads threads of onnxruntime for each call.
  /// @throws BundleError the bundle is incomplete or damaged, cannot stream, or would give wrong results on this processor.
  explicit Recognizer(const std::string& folder, int num_threads = 1) {
    if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1, got " + std::to_string(num_threads));
    model_ = std::make_shared<const Model>(folder, num_threads);
  }

  /// Sample rate of the model in Hz. Streams resample from any other.
  int sample_rate() const { return model_->bundle.manifest.sample_rate; }

  /// Phrases to prefer, for any number of streams.
  /// @throws std::invalid_argument the vocabulary cannot spell a phrase, or a weight is out of range; names the phrase.
  std::shared_ptr<const ContextGraph> hotwords(const std::vector<Hotword>& phrases) const {
    return std::make_shared<const ContextGraph>(phrases, model_->bundle.vocabulary);
  }

  /// A new source of audio; see `Stream`.
  Stream create_stream(Stream::OnResult on_result, const StreamOptions& options = {}) const {
    return Stream(model_, options, std::move(on_result));
  }

 private:
  std::shared_ptr<const Model> model_;
};

}  // namespace u2moe
