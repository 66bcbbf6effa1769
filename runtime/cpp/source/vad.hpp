// Voice activity detection with silero VAD, which the user provides; as runtime/decoding/vad.py has it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "ort.hpp"
#include "speech.hpp"

namespace u2moe::runtime {

/// The network. Immutable: threads may share it.
class Vad {
 public:
  /// What it keeps of the samples before a window.
  struct Past {
    std::vector<float> context;
    std::vector<std::vector<float>> states;
  };

  /// @throws BundleError the content is no silero VAD 5 or 6; begins with `source`.
  Vad(const std::string& content, const std::string& source, const VadOptions& options);

  const VadOptions& options() const { return options_; }

  Past start() const;

  /// The probability that a window of `SpeechFinder` is speech.
  /// @throws ProviderError onnxruntime failed.
  float probability(const float* window, Past& past) const;

 private:
  float run(const float* window, Past& past) const;

  VadOptions options_;
  std::string source_;
  ort::Owned<OrtEnv> env_;
  ort::Owned<OrtSession> session_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<ort::Shape> shapes_;  // of the states
};

}  // namespace u2moe::runtime
