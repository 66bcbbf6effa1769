// Voice activity detection with silero VAD, which the user provides; as runtime/decoding/vad.py has it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "ort.hpp"

namespace u2moe::runtime {

/// See u2moe_vad_options.
struct VadOptions {
  double threshold = 0.5, end_threshold = 0.35, min_silence = 0.6, padding = 0.3;

  /// @throws InvalidArgument an option is out of range.
  void check() const;
};

/// The network. Immutable: threads may share it.
class Vad {
 public:
  static constexpr int kRate = 16000;
  static constexpr std::size_t kWindow = 512;  ///< samples of a probability

  /// What it keeps of the samples before a window.
  struct Past {
    std::vector<float> context;
    std::vector<std::vector<float>> states;
  };

  /// @throws BundleError the content is no silero VAD 5 or 6; begins with `source`.
  Vad(const std::string& content, const std::string& source, const VadOptions& options);

  const VadOptions& options() const { return options_; }

  Past start() const;

  /// The probability that a window is speech.
  /// @throws ProviderError onnxruntime failed.
  double probability(const float* window, Past& past) const;

 private:
  double run(const float* window, Past& past) const;

  VadOptions options_;
  std::string source_;
  ort::Owned<OrtEnv> env_;
  ort::Owned<OrtSession> session_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<ort::Shape> shapes_;  // of the states
};

/// A part of a stretch of speech, from sample `start` of the source on.
struct Speech {
  std::size_t start;
  std::vector<float> samples;
  bool begins, ends;
};

/// Finds the speech of one source, with its padding; any split of its samples gives the same.
class SpeechFinder {
 public:
  explicit SpeechFinder(std::shared_ptr<const Vad> vad);

  /// The parts that are certain after more samples at 16 kHz.
  std::vector<Speech> accept(const std::vector<float>& samples);
  /// The end of the source, padded with silence to a whole window.
  std::vector<Speech> finish();

 private:
  void hear_window(std::vector<Speech>& found);
  Speech part(std::size_t end, bool ends);

  std::shared_ptr<const Vad> vad_;
  Vad::Past past_;
  std::vector<float> held_;                          // samples that may still be given, then those without a probability
  std::size_t held_start_ = 0, heard_ = 0;           // the first of them, and the first without a probability
  std::size_t given_ = 0, spoken_ = 0;               // ends of what was given or dropped, and of the last window with speech
  std::size_t num_silent_ = 0, min_silent_, padding_;
  bool speaks_ = false, begins_ = false;
};

}  // namespace u2moe::runtime
