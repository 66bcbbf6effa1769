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
    const std::vector<std::string> caches = m_.convolution ? std::vector<std::string>{"cnn_cache"} : std::vector<std::string>{};
    std::vector<std::string> inputs = {"chunk", "chunk_lens", "offset", "required_cache_size", "att_cache"};
    inputs.insert(inputs.end(), caches.begin(), caches.end());
    features_ = open(bundle, "features.onnx", num_threads, {"samples"});
    encoder_ = open(bundle, "encoder.onnx", num_threads, inputs);
    ctc_ = open(bundle, "ctc.onnx", num_threads, {"encoder_out"});
    if (m_.has_decoder) decoder_ = open(bundle, "decoder.onnx", num_threads, {"hyps", "hyps_lens", "encoder_out", "encoder_lens"});
  }

  /// Features [frames, mel] of the whole frames of samples.
  Floats features(Floats samples) const {
    const std::array<int64_t, 2> shape = {1, static_cast<int64_t>(samples.size())};
    return values(run(features_, {"samples"}, one(tensor(samples, shape)), {"features"})[0]);
  }

  /// Caches at the beginning of a stream.
  Caches start() const {
    Caches caches;
    if (m_.convolution) caches.cnn.assign(static_cast<std::size_t>(std::int64_t{m_.num_blocks} * m_.conv_dim * m_.conv_cache), 0.0F);
    return caches;
  }

  /// Encoder output [time, dim] of one chunk; the caches become those for the next.
  /// @param required frames of left context to keep; negative: all.
  Floats encode(Floats window, Caches& caches, int64_t required) const {
    int64_t num_frames = static_cast<int64_t>(window.size()) / m_.feature_size;
    const int64_t time = (num_frames - m_.right_context - 1) / m_.subsampling_rate + 1;
    const std::array<int64_t, 1> one = {1};
    const std::array<int64_t, 3> window_shape = {1, num_frames, m_.feature_size};
    const std::array<int64_t, 5> att_shape = {m_.num_blocks, 1, m_.num_kv_heads, caches.length, m_.kv_dim};
    const std::array<int64_t, 4> cnn_shape = {m_.num_blocks, 1, m_.conv_dim, m_.conv_cache};
    std::vector<const char*> inputs = {"chunk", "chunk_lens", "offset", "required_cache_size", "att_cache"};
    std::vector<const char*> outputs = {"output", "next_offset", "r_att_cache"};
    std::vector<Ort::Value> feeds;
    feeds.push_back(tensor(window, window_shape));
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, &num_frames, 1, one.data(), 1));
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, &caches.offset, 1, one.data(), 1));
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, &required, 1, nullptr, 0));
    feeds.push_back(tensor(caches.att, att_shape));
    if (m_.convolution) {
      inputs.push_back("cnn_cache");
      outputs.push_back("r_cnn_cache");
      feeds.push_back(tensor(caches.cnn, cnn_shape));
    }
    const auto found = run(encoder_, inputs, feeds, outputs);
    const int64_t kept = required >= 0 ? std::min(caches.length + time, required) : caches.length + time;
    caches.offset = *found[1].GetTensorData<int64_t>();
    caches.length = found[2].GetTensorTypeAndShapeInfo().GetShape()[3];
    caches.att = values(found[2]);
    if (m_.convolution) caches.cnn = values(found[3]);
    keep_last(caches, kept);
    return values(found[0]);
  }

  /// Keep only the last frames of the attention cache.
  void keep_last(Caches& caches, int64_t length) const {
    if (caches.length <= length) return;
    Floats att;
    for (int64_t row = 0; row < int64_t{m_.num_blocks} * m_.num_kv_heads; ++row) {
      const auto end = caches.att.begin() + (row + 1) * caches.length * m_.kv_dim;
      att.insert(att.end(), end - length * m_.kv_dim, end);
    }
    caches.att = std::move(att);
    caches.length = length;
  }

  /// Log-probabilities [time, vocab] of encoder output [time, dim].
  Floats ctc(Floats output) const {
    const std::array<int64_t, 3> shape = {1, static_cast<int64_t>(output.size()) / m_.output_size, m_.output_size};
    Floats found = with_numbers(ctc_, values(run(ctc_, {"encoder_out"}, one(tensor(output, shape)), {"log_probs"})[0]));
    if (found.size() != static_cast<std::size_t>(shape[1] * m_.vocab_size)) {
      throw InferenceError(ctc_.path + ": gives " + std::to_string(found.size()) + " log-probabilities for " + std::to_string(shape[1]) +
                           " frames and " + std::to_string(m_.vocab_size) + " tokens");
    }
    return found;
  }

  /// Scores of token sequences by the decoders.
  TokenScores score(Floats output, const std::vector<std::vector<int>>& hypotheses) const {
    int64_t num_frames = static_cast<int64_t>(output.size()) / m_.output_size;
    std::size_t length = 1;
    std::vector<int64_t> hyps, lens;
    for (const auto& tokens : hypotheses) length = std::max(length, tokens.size());
    for (const auto& tokens : hypotheses) {
      hyps.insert(hyps.end(), tokens.begin(), tokens.end());
      hyps.insert(hyps.end(), length - tokens.size(), m_.eos);
      lens.push_back(static_cast<int64_t>(tokens.size()));
    }
    const int64_t num = static_cast<int64_t>(hypotheses.size());
    const std::array<int64_t, 3> hyps_shape = {1, num, static_cast<int64_t>(length)};
    const std::array<int64_t, 2> lens_shape = {1, num};
    const std::array<int64_t, 3> output_shape = {1, num_frames, m_.output_size};
    const std::array<int64_t, 1> one = {1};
    std::vector<Ort::Value> feeds;
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, hyps.data(), hyps.size(), hyps_shape.data(), 3));
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, lens.data(), lens.size(), lens_shape.data(), 2));
    feeds.push_back(tensor(output, output_shape));
    feeds.push_back(Ort::Value::CreateTensor<int64_t>(memory_, &num_frames, 1, one.data(), 1));
    std::vector<const char*> outputs = {"score"};
    if (m_.bidirectional) outputs.push_back("r_score");
    const auto found = run(decoder_, {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}, feeds, outputs);
    return {with_numbers(decoder_, values(found[0])),
            m_.bidirectional ? with_numbers(decoder_, values(found[1])) : Floats{}, length + 1};
  }

  bool has_decoder() const { return m_.has_decoder; }

 private:
  struct Graph {
    std::string path;
    mutable Ort::Session session{nullptr};  // its calls change nothing that callers see
  };

  // The session reads the bytes that were verified, not the file a second time.
  Graph open(const Bundle& bundle, const std::string& file, int num_threads, const std::vector<std::string>& inputs) const {
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
    Graph graph;
    graph.path = bundle.path(file);
    try {
      graph.session = Ort::Session(env_, content.data(), content.size(), options);
      check_inputs(graph, inputs);
      check_metadata(graph);
    } catch (const Ort::Exception& error) {
      throw BundleError(graph.path + ": onnxruntime refuses it: " + error.what());
    }
    return graph;
  }

  static void check_inputs(const Graph& graph, const std::vector<std::string>& expected) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> found;
    for (std::size_t i = 0; i < graph.session.GetInputCount(); ++i) found.push_back(graph.session.GetInputNameAllocated(i, allocator).get());
    if (found != expected) throw BundleError(graph.path + ": inputs are " + listed(found) + ", expected " + listed(expected));
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

  static std::string listed(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
  }

  template <std::size_t N>
  Ort::Value tensor(Floats& data, const std::array<int64_t, N>& shape) const {
    return Ort::Value::CreateTensor<float>(memory_, data.data(), data.size(), shape.data(), N);
  }

  static std::vector<Ort::Value> one(Ort::Value value) {
    std::vector<Ort::Value> values;
    values.push_back(std::move(value));
    return values;
  }

  std::vector<Ort::Value> run(const Graph& graph, const std::vector<const char*>& inputs, const std::vector<Ort::Value>& feeds,
                              const std::vector<const char*>& outputs) const {
    try {
      return graph.session.Run(Ort::RunOptions{nullptr}, inputs.data(), feeds.data(), feeds.size(), outputs.data(), outputs.size());
    } catch (const Ort::Exception& error) {
      throw InferenceError(graph.path + ": onnxruntime failed: " + error.what());
    }
  }

  static Floats with_numbers(const Graph& graph, Floats found) {
    if (std::any_of(found.begin(), found.end(), [](float value) { return std::isnan(value); })) {
      throw InferenceError(graph.path + ": gives values that are no numbers: its weights are damaged");
    }
    return found;
  }

  static Floats values(const Ort::Value& value) {
    const float* data = value.GetTensorData<float>();
    return Floats(data, data + value.GetTensorTypeAndShapeInfo().GetElementCount());
  }

  Manifest m_;
  Ort::Env env_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Graph features_, encoder_, ctc_, decoder_;
};

}  // namespace u2moe
