// The graphs of a bundle as functions on arrays. Holds no state of streams.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "number.hpp"

namespace u2moe {

using Floats = std::vector<float>;

/// What the encoder keeps of the past of a stream.
struct Caches {
  int64_t offset = 0;  ///< position of the next frame
  int64_t length = 0;  ///< frames of att
  Floats att, cnn;
};

/// Log-probabilities of tokens and of eos [hypotheses, width] by both decoders; right is empty without that decoder.
struct TokenScores {
  Floats left, right;
  std::size_t width;
};

/// Threads may share it: onnxruntime's sessions allow calls from several threads. All functions throw InferenceError if
/// onnxruntime fails.
class Graphs {
 public:
  /// @throws BundleError a file is missing or damaged, or onnxruntime refuses it.
  Graphs(const Bundle& bundle, int num_threads)
      : m_(bundle.manifest), env_(ORT_LOGGING_LEVEL_FATAL, "u2moe") {  // errors are thrown, and need not be printed as well
    Names inputs = {"chunk", "chunk_lens", "offset", "required_cache_size", "att_cache"}, outputs = {"output", "next_offset", "r_att_cache"};
    if (m_.convolution) {
      inputs.push_back("cnn_cache");
      outputs.push_back("r_cnn_cache");
    }
    features_ = open(bundle, "features.onnx", num_threads, {"samples"}, {"features"});
    encoder_ = open(bundle, "encoder.onnx", num_threads, inputs, outputs);
    ctc_ = open(bundle, "ctc.onnx", num_threads, {"encoder_out"}, {"log_probs"});
    if (!m_.has_decoder) return;
    const Names scores = m_.bidirectional ? Names{"score", "r_score"} : Names{"score"};
    decoder_ = open(bundle, "decoder.onnx", num_threads, {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}, scores);
  }

  /// Features [frames, mel] of the whole frames of samples.
  Floats features(Floats samples) const { return values(run(features_, tensor(samples, {1, length(samples)}))[0]); }

  /// Caches at the beginning of a stream.
  Caches start() const {
    Caches caches;
    if (m_.convolution) caches.cnn.assign(static_cast<std::size_t>(std::int64_t{m_.num_blocks} * m_.conv_dim * m_.conv_cache), 0.0F);
    return caches;
  }

  /// Encoder output [time, dim] of one chunk; the caches become those for the next.
  /// @param required frames of left context to keep; negative: all.
  Floats encode(Floats window, Caches& caches, int64_t required) const {
    const int64_t num_frames = length(window) / m_.feature_size;
    const int64_t time = (num_frames - m_.right_context - 1) / m_.subsampling_rate + 1;
    Integers frames = {num_frames}, offset = {caches.offset}, kept = {required};
    Ort::Value cnn{nullptr};
    if (m_.convolution) cnn = tensor(caches.cnn, {m_.num_blocks, 1, m_.conv_dim, m_.conv_cache});
    const auto found = run(encoder_, tensor(window, {1, num_frames, m_.feature_size}), tensor(frames, {1}), tensor(offset, {1}),
                           tensor(kept, {}), tensor(caches.att, {m_.num_blocks, 1, m_.num_kv_heads, caches.length, m_.kv_dim}),
                           std::move(cnn));
    const int64_t num_kept = required >= 0 ? std::min(caches.length + time, required) : caches.length + time;
    caches.offset = *found[1].GetTensorData<int64_t>();
    caches.length = found[2].GetTensorTypeAndShapeInfo().GetShape()[3];
    caches.att = values(found[2]);
    if (m_.convolution) caches.cnn = values(found[3]);
    keep_last(caches, num_kept);
    return values(found[0]);
  }

  /// Keep only the last frames of the attention cache.
  void keep_last(Caches& caches, int64_t num_frames) const {
    if (caches.length <= num_frames) return;
    Floats att;
    for (int64_t row = 0; row < int64_t{m_.num_blocks} * m_.num_kv_heads; ++row) {
      const auto end = caches.att.begin() + (row + 1) * caches.length * m_.kv_dim;
      att.insert(att.end(), end - num_frames * m_.kv_dim, end);
    }
    caches.att = std::move(att);
    caches.length = num_frames;
  }

  /// Log-probabilities [time, vocab] of encoder output [time, dim].
  Floats ctc(Floats output) const {
    const int64_t num_frames = length(output) / m_.output_size;
    Floats found = numbers(ctc_, run(ctc_, tensor(output, {1, num_frames, m_.output_size}))[0]);
    if (length(found) != num_frames * m_.vocab_size) {
      throw InferenceError(ctc_.path + ": gives " + std::to_string(found.size()) + " log-probabilities for " +
                           std::to_string(num_frames) + " frames and " + std::to_string(m_.vocab_size) + " tokens");
    }
    return found;
  }

  /// Scores of token sequences by the decoders.
  TokenScores score(Floats output, const std::vector<std::vector<int>>& hypotheses) const {
    std::size_t longest = 1;
    for (const auto& tokens : hypotheses) longest = std::max(longest, tokens.size());
    Integers hyps, lens, frames = {length(output) / m_.output_size};
    for (const auto& tokens : hypotheses) {
      hyps.insert(hyps.end(), tokens.begin(), tokens.end());
      hyps.insert(hyps.end(), longest - tokens.size(), m_.eos);
      lens.push_back(length(tokens));
    }
    const int64_t num = length(hypotheses);
    const auto found = run(decoder_, tensor(hyps, {1, num, static_cast<int64_t>(longest)}), tensor(lens, {1, num}),
                           tensor(output, {1, frames[0], m_.output_size}), tensor(frames, {1}));
    return {numbers(decoder_, found[0]), m_.bidirectional ? numbers(decoder_, found[1]) : Floats{}, longest + 1};
  }

 private:
  using Integers = std::vector<int64_t>;
  using Names = std::vector<const char*>;

  struct Graph {
    std::string path;
    Names inputs, outputs;
    mutable Ort::Session session{nullptr};  // its calls change nothing that callers see
  };

  // The session reads the bytes that were verified, not the file a second time.
  Graph open(const Bundle& bundle, const std::string& file, int num_threads, const Names& inputs, const Names& outputs) const {
    const std::string data = file + ".data";
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(num_threads);
    options.SetInterOpNumThreads(1);
    options.DisableMemPattern();
    std::vector<char> weights;
    if (bundle.has(data)) {
      weights = bundle.verified(data);
      options.AddExternalInitializersFromFilesInMemory({data}, {weights.data()}, {weights.size()});
    }
    const std::vector<char> content = bundle.verified(file);
    Graph graph{bundle.path(file), inputs, outputs};
    try {
      graph.session = Ort::Session(env_, content.data(), content.size(), options);
      check_inputs(graph);
      check_metadata(graph);
    } catch (const Ort::Exception& error) {
      throw BundleError(graph.path + ": onnxruntime refuses it: " + error.what());
    }
    return graph;
  }

  static void check_inputs(const Graph& graph) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::string found, expected;
    for (std::size_t i = 0; i < graph.session.GetInputCount(); ++i) {
      found += std::string(" ") + graph.session.GetInputNameAllocated(i, allocator).get();
    }
    for (const char* name : graph.inputs) expected += std::string(" ") + name;
    if (found != expected) throw BundleError(graph.path + ": inputs are" + found + ", expected" + expected);
  }

  // A graph that states other numbers than the manifest is of another bundle.
  void check_metadata(const Graph& graph) const {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto metadata = graph.session.GetModelMetadata();
    for (const auto& [name, value] : m_.stated()) {
      const auto found = metadata.LookupCustomMetadataMapAllocated(("u2moe." + name).c_str(), allocator);
      const auto number = found ? parse_number(found.get()) : std::nullopt;
      if (found && (!number || *number != value)) {
        throw BundleError(graph.path + ": u2moe." + name + " is " + found.get() + ", which is not that of bundle.json");
      }
    }
  }

  template <class Items>
  static int64_t length(const Items& items) {
    return static_cast<int64_t>(items.size());
  }

  // A view of `data`, which must live as long.
  template <class T>
  Ort::Value tensor(std::vector<T>& data, const Integers& shape) const {
    return Ort::Value::CreateTensor<T>(memory_, data.data(), data.size(), shape.data(), shape.size());
  }

  // Outputs for inputs in the order of their names; those that the graph does not have are left out at the end.
  template <class... Tensors>
  static std::vector<Ort::Value> run(const Graph& graph, Tensors... tensors) {
    const std::array<Ort::Value, sizeof...(Tensors)> feeds = {std::move(tensors)...};
    try {
      return graph.session.Run(Ort::RunOptions{nullptr}, graph.inputs.data(), feeds.data(), graph.inputs.size(),
                               graph.outputs.data(), graph.outputs.size());
    } catch (const Ort::Exception& error) {
      throw InferenceError(graph.path + ": onnxruntime failed: " + error.what());
    }
  }

  static Floats values(const Ort::Value& value) {
    const float* data = value.GetTensorData<float>();
    return Floats(data, data + value.GetTensorTypeAndShapeInfo().GetElementCount());
  }

  static Floats numbers(const Graph& graph, const Ort::Value& value) {
    Floats found = values(value);
    if (std::any_of(found.begin(), found.end(), [](float each) { return std::isnan(each); })) {
      throw InferenceError(graph.path + ": gives values that are no numbers: its weights are damaged");
    }
    return found;
  }

  Manifest m_;
  Ort::Env env_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Graph features_, encoder_, ctc_, decoder_;
};

}  // namespace u2moe
