// The graphs of a bundle as functions on arrays. Holds no state of streams.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "errors.hpp"
#include "number.hpp"
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
  Graphs(const Bundle& bundle, const Settings& settings) : m_(bundle.manifest()), env_(ort::environment()) {
    Names inputs = {"chunk", "chunk_lens"}, outputs = {"output"};
    if (m_.streaming) {
      inputs.insert(inputs.end(), {"offset", "required_cache_size"});
      outputs.push_back("next_offset");
    }
    for (const CacheLayout& cache : m_.caches) {
      inputs.push_back(cache.name);
      outputs.push_back("r_" + cache.name);
    }
    // Sessions one after another: onnxruntime crashes where two start at once and memory is short. But the largest file is read and
    // compared while onnxruntime starts with the smallest graph.
    std::future<std::string> largest = std::async([&bundle] { return bundle.verified("encoder.onnx"); });
    features_ = open(bundle, settings, "features.onnx", bundle.verified("features.onnx"), {"samples"}, {"features"});
    encoder_ = open(bundle, settings, "encoder.onnx", largest.get(), inputs, outputs);
    ctc_ = open(bundle, settings, "ctc.onnx", bundle.verified("ctc.onnx"), {"encoder_out"}, {"log_probs"});
    if (!m_.has_decoder) return;
    const Names scores = m_.bidirectional ? Names{"score", "next_log_probs", "r_score"} : Names{"score", "next_log_probs"};
    decoder_ = open(bundle, settings, "decoder.onnx", bundle.verified("decoder.onnx"), {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}, scores);
  }

  /// Features [frames, mel] of the whole frames of samples.
  Floats features(Floats samples) const {
    return ort::numbers_of<float>(*run(features_, ort::values(ort::tensor(samples, {1, length(samples)})))[0]);
  }

  /// Caches at the beginning of a stream.
  Caches start() const {
    Caches caches;
    for (const CacheLayout& cache : m_.caches) caches.tensors.push_back(tensor(Floats(ort::count(cache.shape)), cache.shape));
    return caches;
  }

  /// Encoder output [time, dim] of one chunk [frames, mel]; the caches become those for the next.
  /// @param required frames of left context to keep; negative: all.
  Floats encode(Floats window, Caches& caches, std::int64_t required) const {
    const std::int64_t num_frames = length(window) / m_.feature_size;
    std::vector<std::int64_t> frames = {num_frames}, offset = {caches.offset}, kept = {required};
    ort::Values inputs = ort::values(ort::tensor(window, {1, num_frames, m_.feature_size}), ort::tensor(frames, {1}));
    if (m_.streaming) {
      inputs.push_back(ort::tensor(offset, {1}));
      inputs.push_back(ort::tensor(kept, {}));
    }
    for (Caches::Tensor& cache : caches.tensors) inputs.push_back(std::move(cache.value));
    ort::Values found = run(encoder_, inputs);
    if (m_.streaming) caches.offset = ort::numbers_of<std::int64_t>(*found[1])[0];
    for (std::size_t i = 0; i < caches.tensors.size(); ++i) caches.tensors[i] = {{}, std::move(found[2 + i])};
    return ort::numbers_of<float>(*found[0]);
  }

  /// Keep, of the caches that grow, only the frames for the last `num_frames` encoder frames.
  void keep_last(Caches& caches, std::int64_t num_frames) const {
    for (std::size_t i = 0; i < m_.caches.size(); ++i) {
      if (m_.caches[i].time_axis < 0) continue;
      ort::Shape shape = ort::shape_of(*caches.tensors[i].value);
      const auto axis = shape.begin() + m_.caches[i].time_axis;
      const auto wanted = static_cast<std::int64_t>(std::ceil(static_cast<double>(num_frames) * m_.caches[i].rate));
      if (*axis <= wanted) continue;
      const auto width = static_cast<std::int64_t>(ort::count({axis + 1, shape.end()})), rows = static_cast<std::int64_t>(ort::count({shape.begin(), axis}));
      const Floats data = ort::numbers_of<float>(*caches.tensors[i].value);
      Floats last;
      for (std::int64_t row = 1; row <= rows; ++row) {
        const auto end = data.begin() + row * *axis * width;
        last.insert(last.end(), end - wanted * width, end);
      }
      *axis = wanted;
      caches.tensors[i] = tensor(std::move(last), shape);
    }
  }

  /// Log-probabilities [time, vocab] of encoder output [time, dim].
  Floats ctc(Floats output) const {
    const std::int64_t num_frames = length(output) / m_.output_size;
    if (num_frames == 0) return {};
    const ort::Values given = run(ctc_, ort::values(ort::tensor(output, {1, num_frames, m_.output_size})));
    Floats found = checked(ctc_.path, ort::numbers_of<float>(*given[0]));
    if (length(found) != num_frames * m_.vocab_size) {
      throw ProviderError(ctc_.path + ": gives " + std::to_string(found.size()) + " log-probabilities for " +
                          std::to_string(num_frames) + " frames and " + std::to_string(m_.vocab_size) + " tokens");
    }
    return found;
  }

  /// Scores of token sequences by the decoders.
  TokenScores score(const Floats& output, const Sequences& sequences) const {
    // Attention takes memory for each pair of a token and a frame or another token: those of a long utterance are scored in several calls.
    constexpr std::int64_t most_pairs = std::int64_t{1} << 22;
    const auto longest = static_cast<std::int64_t>(sequences.longest);
    const std::int64_t num_frames = length(output) / m_.output_size, num_sequences = length(sequences.lengths);
    const std::int64_t num_rows = std::max<std::int64_t>(most_pairs / (longest * std::max(num_frames, longest)), 1);
    TokenScores scores;
    scores.width = sequences.longest + 1;
    Floats frames = output;
    for (std::int64_t begin = 0; begin < num_sequences; begin += num_rows) {
      const std::int64_t end = std::min(begin + num_rows, num_sequences);
      std::vector<std::int64_t> hyps(sequences.tokens.begin() + begin * longest, sequences.tokens.begin() + end * longest);
      std::vector<std::int64_t> lens(sequences.lengths.begin() + begin, sequences.lengths.begin() + end), num = {num_frames};
      const ort::Values found = run(decoder_, ort::values(ort::tensor(hyps, {1, end - begin, longest}), ort::tensor(lens, {1, end - begin}),
                                                          ort::tensor(frames, {1, num_frames, m_.output_size}), ort::tensor(num, {1})));
      const auto append = [&](Floats& all, std::size_t index) {
        const Floats values = checked(decoder_.path, ort::numbers_of<float>(*found[index]));
        all.insert(all.end(), values.begin(), values.end());
      };
      append(scores.left, 0);
      append(scores.next, 1);
      if (m_.bidirectional) append(scores.right, 2);
    }
    return scores;
  }

  /// What computes the encoder.
  const Kernels& kernels() const { return encoder_.kernels; }

 private:
  template <class Items>
  static std::int64_t length(const Items& items) {
    return static_cast<std::int64_t>(items.size());
  }

  static Caches::Tensor tensor(Floats data, const ort::Shape& shape) {
    Caches::Tensor made{std::move(data), nullptr};
    made.value = ort::tensor(made.own, shape);
    return made;
  }

  static Floats checked(const std::string& path, Floats values) {
    if (std::any_of(values.begin(), values.end(), [](float each) { return std::isnan(each); })) {
      throw ProviderError(path + ": gives values that are no numbers: its weights are damaged");
    }
    return values;
  }

  static std::string listed(const std::vector<std::string>& names) {
    std::string all;
    for (const std::string& name : names) all += " " + name;
    return all;
  }

  // A session from bytes that were verified: no file is read a second time.
  static ort::Owned<OrtSession> session_of(const OrtEnv* env, const std::string& content, const std::string& data, std::string weights,
                                           OrtSessionOptions* options) {
    if (!data.empty()) {
      const std::basic_string<ORTCHAR_T> name(data.begin(), data.end());
      const ORTCHAR_T* names[] = {name.c_str()};
      char* contents[] = {weights.data()};
      const std::size_t sizes[] = {weights.size()};
      ort::check(ort::api().AddExternalInitializersFromFilesInMemory(options, names, contents, sizes, 1));
    }
    return ort::made<OrtSession>(ort::api().CreateSessionFromArray, env, content.data(), content.size(),
                                 static_cast<const OrtSessionOptions*>(options));
  }

  using Names = std::vector<std::string>;

  struct Graph {
    std::string path;
    Names inputs, outputs;
    Kernels kernels;
    ort::Owned<OrtSession> session;
  };

  Graph open(const Bundle& bundle, const Settings& settings, const std::string& file, const std::string& content, Names inputs,
             Names outputs) const {
    const std::string data = bundle.has(file + ".data") ? file + ".data" : "";
    const std::string weights = data.empty() ? "" : bundle.verified(data);
    Graph graph{bundle.path(file), std::move(inputs), std::move(outputs), settings.kernels(), {}};
    if (m_.packed && !settings.are_of_the_caller()) {
      const std::string where = graph.path + ": weights are packed for native kernels";
      if (!graph.kernels.native) throw KernelsError(where + ", but onnxruntime runs it: " + graph.kernels.reason);
      if (graph.kernels.layout != m_.packed) {
        throw KernelsError(where + " in layout " + std::to_string(m_.packed) + ", those of this library read " +
                           std::to_string(graph.kernels.layout) + ": quantize the float32 bundle again with its version");
      }
    }
    // So that numbers in float32 do not depend on how the library was built.
    if (graph.kernels.native && settings.wanted_kernels() == "auto" && !m_.quantized) graph.kernels = {false, "", 0, "weights are in float32"};
    const auto load = [&] {
      graph.session = session_of(env_.get(), content, data, weights, settings.session_options(graph.kernels.native).get());
    };
    try {
      try {
        load();
      } catch (const ort::Failure& error) {
        if (!graph.kernels.native || m_.packed) throw;
        const std::string reason = error.what();
        graph.kernels = {false, "", 0, "native kernels cannot run it: " + reason};
        load();  // fails if the graph itself is damaged
        if (settings.wanted_kernels() == "native") throw KernelsError(graph.path + ": " + graph.kernels.reason);
      }
      check(graph);
    } catch (const ort::Failure& error) {
      if (!settings.is_cpu()) throw ProviderError(graph.path + ": " + settings.providers()[0].name + " did not start: " + error.what());
      throw BundleError(graph.path + ": onnxruntime refuses it: " + error.what());
    }
    return graph;
  }

  // Its names are those of the contract, and its numbers those of the manifest: others are of another bundle.
  void check(const Graph& graph) const {
    const Names found = ort::input_names(*graph.session), given = ort::output_names(*graph.session);
    if (found != graph.inputs) throw BundleError(graph.path + ": inputs are" + listed(found) + ", expected" + listed(graph.inputs));
    for (const std::string& name : graph.outputs) {
      if (!std::count(given.begin(), given.end(), name)) throw BundleError(graph.path + ": outputs are" + listed(given) + ", expected " + name);
    }
    const auto metadata = ort::made<OrtModelMetadata>(ort::api().SessionGetModelMetadata, static_cast<const OrtSession*>(graph.session.get()));
    if (ort::metadata(*metadata, "u2moe.version").empty()) return;
    for (const auto& [name, value, otherwise] : m_.stated()) {
      std::string text = ort::metadata(*metadata, "u2moe." + name);
      if (text.empty()) text = json_text(otherwise);
      if (parse_number(text) != value) {
        throw BundleError(graph.path + ": u2moe." + name + " is " + text + ", which is not that of bundle.json");
      }
    }
  }

  ort::Values run(const Graph& graph, const ort::Values& inputs) const {
    try {
      return ort::run(*graph.session, graph.inputs, inputs, graph.outputs);
    } catch (const ort::Failure& error) {
      throw ProviderError(graph.path + ": onnxruntime failed: " + error.what());
    }
  }

  Manifest m_;
  ort::Owned<OrtEnv> env_;
  Graph features_, encoder_, ctc_, decoder_;
};

}  // namespace u2moe::runtime
