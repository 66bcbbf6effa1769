// The graphs of a bundle as functions on arrays. Holds no state of streams.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "ort.hpp"
#include "recognition.hpp"
#include "settings.hpp"

namespace u2moe::runtime {

/// What the encoder keeps of the past of a stream.
struct Caches {
  /// One of those that the manifest lists: an output of the encoder as it is, or a view of `own`.
  struct Tensor {
    Floats own;
    ort::Owned<OrtValue> value;
  };
  std::int64_t offset = 0;  ///< position of the next frame
  std::vector<Tensor> tensors;
};

/// Threads may share it: onnxruntime's sessions allow calls from several threads. All functions throw ProviderError if
/// onnxruntime fails.
class Graphs {
 public:
  /// @throws BundleError a file is missing or damaged, or onnxruntime refuses it.
  /// @throws ProviderError a provider does not start.
  /// @throws KernelsError native kernels were asked for, or weights are packed for them, and they cannot run.
  Graphs(const Bundle& bundle, const Settings& settings);

  /// Features [frames, mel] of the whole frames of samples.
  Floats features(Floats samples) const;

  /// Caches at the beginning of a stream.
  Caches start() const;

  /// Encoder output [time, dim] of one chunk [frames, mel]; the caches become those for the next.
  /// @param required frames of left context to keep; negative: all.
  Floats encode(Floats window, Caches& caches, std::int64_t required) const;

  /// Keep, of the caches that grow, only the frames for the last `num_frames` encoder frames.
  void keep_last(Caches& caches, std::int64_t num_frames) const;

  /// Log-probabilities [time, vocab] of encoder output [time, dim].
  Floats ctc(Floats output) const;

  /// Scores of token sequences by the decoders.
  TokenScores score(const Floats& output, const Sequences& sequences) const;

  /// What computes the encoder.
  const Kernels& kernels() const { return encoder_.kernels; }

 private:
  using Names = std::vector<std::string>;

  struct Graph {
    std::string path;
    Names inputs, outputs;
    Kernels kernels;
    ort::Owned<OrtSession> session;
  };

  Graph open(const Bundle& bundle, const Settings& settings, const std::string& file, const std::string& content, Names inputs, Names outputs) const;
  void check(const Graph& graph) const;
  ort::Values run(const Graph& graph, const ort::Values& inputs) const;

  Manifest m_;
  ort::Owned<OrtEnv> env_;
  Graph features_, encoder_, ctc_, decoder_;
};

}  // namespace u2moe::runtime
