// The graphs of a bundle as functions on arrays, without stream state.
#pragma once

#include <future>

#include "bundle.hpp"
#include "recognition.hpp"
#include "settings.hpp"
#include "static_encoder.hpp"

namespace u2moe::runtime {

/// Encoder state of a stream.
struct Caches {
  /// A cache that the manifest lists: an output of the encoder, or a view of `own`.
  struct Tensor {
    Floats own;
    ort::Owned<OrtValue> value;
  };
  std::int64_t offset = 0, num_cached = 0;  ///< position of the next frame; encoder frames in growing caches
  std::vector<Tensor> tensors;
};

/// A window of features [frames, mel], and the caches of the frames before it.
struct Chunk {
  const Floats* window;
  Caches* caches;
};

/// The graphs of a bundle. Threads may share them: onnxruntime sessions allow concurrent calls. All functions throw
/// ProviderError if onnxruntime or the program's runner fails.
class Graphs {
 public:
  /// @throws BundleError if a file is missing or damaged, or onnxruntime rejects it.
  /// @throws ProviderError if a provider does not start.
  /// @throws KernelsError if the settings or packed weights require native kernels, but these cannot run or are disabled.
  /// @throws InvalidArgument if the settings have a runner but the bundle has no fixed shapes.
  Graphs(const Bundle& bundle, const Settings& settings) : m_(bundle.manifest()), runner_(settings.runner), env_(ort::environment()) {
    if (runner_ && !m_.form) throw InvalidArgument("runner needs a bundle of fixed shape, which " + bundle.path("bundle.json") + " is not");
    Names inputs = {"chunk", "chunk_lens"}, outputs = {"output"};
    const char* const encoder = m_.form ? "static" : "encoder";
    if (m_.streaming && !m_.form) {
      inputs.insert(inputs.end(), {"offset", "required_cache_size"});
      outputs.push_back("next_offset");
    }
    for (const CacheLayout& cache : m_.caches) {
      inputs.push_back(cache.name);
      outputs.push_back("r_" + cache.name);
    }
    if (m_.form) inputs = static_.emplace(bundle).names();
    // Settings for a device apply only to `static.onnx`, the only graph that is compiled for the device.
    const std::optional<Settings> cpu = m_.form ? std::optional(settings.on_cpu()) : std::nullopt;
    const Settings& others = cpu ? *cpu : settings;
    // Start sessions one after another, since onnxruntime crashes if two start at once when memory is short. While onnxruntime
    // loads the smallest graph, another thread reads and verifies the largest file.
    const auto read = [&bundle](const char* graph) { return bundle.verified(file_of(bundle, graph)); };
    std::future<std::string> largest = std::async([&] { return runner_ ? "" : read(encoder); });
    ctc_ = open(bundle, others, "ctc", read("ctc"), {"encoder_out"}, {"log_probs"});
    if (runner_) encoder_ = {"static", inputs, outputs, {}, {}};
    else encoder_ = open(bundle, settings, encoder, largest.get(), inputs, outputs);
    for (std::size_t i = 0; encoder_.session && static_ && i < inputs.size(); ++i) {
      const std::string found = shown(ort::input_shape(*encoder_.session, i)), expected = shown(static_->shape(inputs[i]));
      if (found != expected) throw BundleError(encoder_.path + ": input " + inputs[i] + ": is " + found + ", expected " + expected);
    }
    if (!m_.has_decoder) return;
    const Names scores = m_.bidirectional ? Names{"score", "next_log_probs", "r_score"} : Names{"score", "next_log_probs"};
    decoder_ = open(bundle, others, "decoder", read("decoder"), {"hyps", "hyps_lens", "encoder_out", "encoder_lens"}, scores);
  }

  /// Initial caches of a stream.
  Caches start() const {
    Caches caches;
    for (const CacheLayout& cache : m_.caches) {
      if (static_) caches.tensors.push_back(tensor(static_->start(cache.name), static_->shape(cache.name)));
      else caches.tensors.push_back(tensor(Floats(ort::count(cache.shape)), cache.shape));
    }
    return caches;
  }

  /// Encode one chunk of each stream, and update the streams' caches. Return the encoder output [time, dim] of each chunk.
  /// @param required frames of left context to keep; negative: all.
  std::vector<Floats> encode(const std::vector<Chunk>& chunks, std::int64_t required) const {
    std::vector<Floats> outputs;
    for (std::size_t i = 0; static_ && i < chunks.size(); ++i) outputs.push_back(encode_static(*chunks[i].window, *chunks[i].caches));
    if (static_) return outputs;
    const std::int64_t num = length(chunks);
    std::int64_t longest = 0;
    std::vector<std::int64_t> frames, offsets, kept = {required};
    for (const Chunk& chunk : chunks) {
      frames.push_back(length(*chunk.window) / m_.feature_size);
      offsets.push_back(chunk.caches->offset);
      longest = std::max(longest, frames.back());
    }
    Floats windows;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      windows.insert(windows.end(), chunks[i].window->begin(), chunks[i].window->end());
      windows.resize((i + 1) * static_cast<std::size_t>(longest * m_.feature_size));
    }
    ort::Values inputs = ort::values(ort::tensor(windows, {num, longest, m_.feature_size}), ort::tensor(frames, {num}));
    if (m_.streaming) {
      inputs.push_back(ort::tensor(offsets, {num}));
      inputs.push_back(ort::tensor(kept, {}));
    }
    std::vector<Floats> joined(m_.caches.size());
    for (std::size_t i = 0; i < m_.caches.size(); ++i) {
      inputs.push_back(num > 1 ? join(chunks, i, joined[i]) : std::move(chunks[0].caches->tensors[i].value));
    }
    const std::int64_t most = (longest - m_.right_context - 1) / m_.subsampling_rate + 1;
    std::vector<ort::Shape> shapes = {{num, most, m_.output_size}};
    if (m_.streaming) shapes.push_back({num});
    for (const CacheLayout& cache : m_.caches) {
      ort::Shape& shape = shapes.emplace_back(cache.shape);
      shape[1] = num;
      if (cache.time_axis >= 0) shape[static_cast<std::size_t>(cache.time_axis)] = -1;
    }
    ort::Values found = run(encoder_, inputs, shapes);
    const Floats output = ort::numbers_of<float>(*found[0]);
    const auto next = m_.streaming ? ort::numbers_of<std::int64_t>(*found[1]) : std::vector<std::int64_t>();
    for (std::int64_t row = 0; row < num; ++row) {
      const auto index = static_cast<std::size_t>(row);
      Caches& caches = *chunks[index].caches;
      const std::int64_t num_frames = (frames[index] - m_.right_context - 1) / m_.subsampling_rate + 1;
      const auto begin = output.begin() + row * most * m_.output_size;
      outputs.emplace_back(begin, begin + num_frames * m_.output_size);
      if (m_.streaming) caches.offset = next[index];
      caches.num_cached = required < 0 ? caches.num_cached + num_frames : std::min(caches.num_cached + num_frames, required);
      for (std::size_t i = 0; i < m_.caches.size(); ++i) {
        if (num > 1) caches.tensors[i] = split(*found[2 + i], i, row, caches.num_cached);
        else caches.tensors[i] = {{}, std::move(found[2 + i])};
      }
    }
    return outputs;
  }

  /// Truncate growing caches to the last `num_frames` encoder frames. The stream continues as if it had begun with these.
  void keep_last(Caches& caches, std::int64_t num_frames) const {
    caches.offset = num_frames;
    caches.num_cached = std::min(num_frames, caches.num_cached);
    for (std::size_t i = 0; i < m_.caches.size(); ++i) {
      if (static_) static_->keep_last(m_.caches[i], num_frames, ort::data_of<float>(*caches.tensors[i].value));
      else if (m_.caches[i].time_axis >= 0) caches.tensors[i] = split(*caches.tensors[i].value, i, 0, num_frames);
    }
  }

  /// Compute the log-probabilities [time, vocab] for encoder output [time, dim].
  Floats ctc(Floats output) const {
    const std::int64_t num_frames = length(output) / m_.output_size;
    if (num_frames == 0) return {};
    const ort::Values found = run(ctc_, ort::values(ort::tensor(output, {1, num_frames, m_.output_size})), {{1, num_frames, m_.vocab_size}});
    return checked(ctc_.path, ort::numbers_of<float>(*found[0]));
  }

  /// Score token sequences with the decoders.
  TokenScores score(const Floats& output, const Sequences& sequences) const {
    // Attention needs memory for each pair of tokens, and of a token and a frame. Score long utterances in several calls.
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
      const ort::Shape each = {1, end - begin, longest + 1};
      const ort::Values found = run(decoder_, ort::values(ort::tensor(hyps, {1, end - begin, longest}), ort::tensor(lens, {1, end - begin}),
                                                          ort::tensor(frames, {1, num_frames, m_.output_size}), ort::tensor(num, {1})),
                                    {each, {1, end - begin, m_.vocab_size}, each});
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

  /// Return the kernels of the encoder, or of the CTC head if the caller's runner replaces the encoder. The result's `refused`
  /// lists, for all graphs, the functions that native kernels cannot run, such as "Int8Attention of encoder".
  Kernels kernels() const {
    Kernels all = (runner_ ? ctc_ : encoder_).kernels;
    all.refused.clear();
    for (const auto& [name, graph] : {std::pair("encoder", &encoder_), {"ctc", &ctc_}, {"decoder", &decoder_}}) {
      for (const auto& [function, reason] : graph->kernels.refused) all.refused.emplace(function + " of " + name, reason);
      if (all.native && graph->session && !graph->kernels.native) all.refused.emplace(std::string("all of ") + name, graph->kernels.reason);
    }
    return all;
  }

 private:
  // The graph's log-probabilities are not used: `ctc` computes them, as for other bundles.
  Floats encode_static(const Floats& window, Caches& caches) const {
    const std::int64_t num_frames = static_->num_frames(window), num = static_->num_outputs(num_frames);
    const std::int64_t position = static_->position(caches.offset, num_frames);
    std::map<std::string, Floats> feeds = static_->feeds(window, position, caches.num_cached);
    ort::Values inputs;
    for (std::size_t i = 0; i + m_.caches.size() < encoder_.inputs.size(); ++i) {
      inputs.push_back(ort::tensor(feeds[encoder_.inputs[i]], static_->shape(encoder_.inputs[i])));
    }
    for (std::size_t i = 0; i < m_.caches.size(); ++i) {
      static_->begin_history(m_.caches[i], position, ort::data_of<float>(*caches.tensors[i].value));
      inputs.push_back(std::move(caches.tensors[i].value));
    }
    std::vector<ort::Shape> shapes;
    for (const std::string& name : encoder_.outputs) shapes.push_back(static_->shape(name));
    ort::Values found = runner_ ? run_own(inputs) : run(encoder_, inputs, shapes);
    for (std::size_t i = 0; i < m_.caches.size(); ++i) caches.tensors[i] = {{}, std::move(found[1 + i])};
    caches.offset = position / m_.frame_reduction + num;
    caches.num_cached = std::min(caches.num_cached + num, static_->num_left());
    Floats output = ort::numbers_of<float>(*found[0]);
    output.resize(static_cast<std::size_t>(num * m_.output_size));
    return output;
  }

  // Run `static.onnx` with the program's runner.
  ort::Values run_own(const ort::Values& inputs) const {
    ort::Values found;
    for (const std::string& name : encoder_.outputs) found.push_back(ort::own_tensor(static_->shape(name)));
    const std::vector<u2moe_tensor> outputs = tensors(encoder_.outputs, found);
    for (const u2moe_tensor& each : outputs) std::fill_n(each.data, ort::count(static_->shape(each.name)), std::nanf(""));
    const int status = runner_(tensors(encoder_.inputs, inputs), outputs);
    if (status) throw ProviderError("static: the runner returned " + std::to_string(status) + ", expected 0");
    for (const u2moe_tensor& each : outputs) {
      const ort::Shape& shape = static_->shape(each.name);
      if (std::all_of(each.data, each.data + ort::count(shape), [](float value) { return std::isfinite(value); })) continue;
      throw ProviderError(std::string("static: output ") + each.name + ": found NaN or infinity, expected " + shown(shape));
    }
    return found;
  }

  std::vector<u2moe_tensor> tensors(const std::vector<std::string>& names, const ort::Values& values) const {
    std::vector<u2moe_tensor> all;
    for (std::size_t i = 0; i < names.size(); ++i) {
      const ort::Shape& shape = static_->shape(names[i]);
      all.push_back({names[i].c_str(), shape.data(), shape.size(), ort::data_of<float>(*values[i])});
    }
    return all;
  }

  template <class Items>
  static std::int64_t length(const Items& items) {
    return static_cast<std::int64_t>(items.size());
  }

  static Caches::Tensor tensor(Floats data, const ort::Shape& shape) {
    Caches::Tensor made{std::move(data), nullptr};
    made.value = ort::tensor(made.own, shape);
    return made;
  }

  // Join caches [blocks, 1, ...] of several streams into [blocks, streams, ...]. Shorter caches are those of young streams.
  // They are padded at the front, where positions are negative, so that the graph masks the padding.
  ort::Owned<OrtValue> join(const std::vector<Chunk>& chunks, std::size_t index, Floats& joined) const {
    const std::ptrdiff_t time = m_.caches[index].time_axis;
    ort::Shape shape = m_.caches[index].shape;
    shape[1] = length(chunks);
    std::vector<const float*> data;
    std::vector<std::size_t> rows;  // number of floats in a block
    std::size_t longest = 0;
    for (const Chunk& chunk : chunks) {
      const OrtValue& value = *chunk.caches->tensors[index].value;
      ort::Shape own = ort::shape_of<float>(value);
      if (time >= 0) shape[static_cast<std::size_t>(time)] = std::max(shape[static_cast<std::size_t>(time)], own[static_cast<std::size_t>(time)]);
      rows.push_back(ort::count(own) / static_cast<std::size_t>(own[0]));
      data.push_back(ort::data_of<float>(value));
      longest = std::max(longest, rows.back());
    }
    // Other axes, such as heads, may lie between the batch axis and the growing axis.
    const std::size_t outer = time < 0 ? 1 : ort::count({shape.begin() + 2, shape.begin() + time});
    joined.assign(ort::count(shape), 0.0F);
    float* place = joined.data();
    for (std::int64_t block = 0; block < shape[0]; ++block) {
      for (std::size_t row = 0; row < chunks.size(); ++row) {
        const std::size_t part = rows[row] / outer;
        for (std::size_t i = 0; i < outer; ++i, place += longest / outer, data[row] += part) std::copy_n(data[row], part, place + longest / outer - part);
      }
    }
    return ort::tensor(joined, shape);
  }

  // Extract one stream's cache from the joined cache. Keep only the last `num_frames` encoder frames if it grows with time.
  Caches::Tensor split(const OrtValue& value, std::size_t index, std::int64_t row, std::int64_t num_frames) const {
    const std::ptrdiff_t time = m_.caches[index].time_axis;
    ort::Shape shape = ort::shape_of<float>(value);
    const std::size_t num_rows = static_cast<std::size_t>(std::exchange(shape[1], 1)), size = ort::count({shape.begin() + 1, shape.end()});
    std::size_t outer = 1, part = size, kept = size;
    if (time >= 0) {
      std::int64_t& frames = shape[static_cast<std::size_t>(time)];
      outer = ort::count({shape.begin() + 2, shape.begin() + time});
      part = size / outer;
      const std::int64_t last = std::min(frames, m_.caches[index].num_cached(num_frames));
      kept = frames ? part / static_cast<std::size_t>(frames) * static_cast<std::size_t>(last) : 0;
      frames = last;
    }
    Floats own;
    own.reserve(ort::count(shape));
    const float* data = ort::data_of<float>(value) + static_cast<std::size_t>(row) * size;
    for (std::int64_t block = 0; block < shape[0]; ++block, data += (num_rows - 1) * size) {
      for (std::size_t i = 0; i < outer; ++i, data += part) own.insert(own.end(), data + part - kept, data + part);
    }
    return tensor(std::move(own), shape);
  }

  static Floats checked(const std::string& path, Floats values) {
    if (std::any_of(values.begin(), values.end(), [](float each) { return std::isnan(each); })) {
      throw ProviderError(path + ": returned NaN: its weights are damaged");
    }
    return values;
  }

  // Create a session from verified bytes, without reading a file.
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

  // Name of a graph's file, which is in ONNX or ORT format. In ORT format, functions are expanded.
  static std::string file_of(const Bundle& bundle, const std::string& graph) {
    return bundle.has(graph + ".ort") ? graph + ".ort" : graph + ".onnx";
  }

  Graph open(const Bundle& bundle, const Settings& settings, const std::string& name, const std::string& content, Names inputs,
             Names outputs) const {
    const std::string file = file_of(bundle, name), data = bundle.has(file + ".data") ? file + ".data" : "";
    const std::string weights = data.empty() ? "" : bundle.verified(data);
    Graph graph{bundle.path(file), std::move(inputs), std::move(outputs), settings.kernels(), {}};
    if (m_.packed && !settings.are_of_the_caller()) {
      const std::string where = graph.path + ": weights are packed for native kernels";
      if (!graph.kernels.native) throw KernelsError(where + ", but onnxruntime runs the graph: " + graph.kernels.reason);
      if (graph.kernels.layout != m_.packed) {
        throw KernelsError(where + " in layout " + std::to_string(m_.packed) + ", but this library reads layout " +
                           std::to_string(graph.kernels.layout) + ": quantize the float32 bundle again with this version");
      }
    }
    // By default, onnxruntime's own kernels run float32 graphs, so that results do not depend on how the library was built.
    const bool is_automatic = settings.wanted_kernels() == "auto", is_ort = file != name + ".onnx";
    if (graph.kernels.native && is_automatic && !m_.quantized) graph.kernels = Kernels{false, "", 0, "weights are in float32"};
    if (graph.kernels.native && is_ort) graph.kernels = Kernels{false, "", 0, "files in ORT format have expanded functions"};
    std::string refusal;
    try {
      while (!graph.session) {
        try {
          graph.session = session_of(env_.get(), content, data, weights, settings.session_options(graph.kernels).get());
        } catch (const ort::Failure& error) {
          // Native kernels reject unknown features, such as an activation of a later version. Try again without the
          // function that the error names or, if it names none, without native kernels. The last attempt fails if the graph
          // itself is damaged.
          if (!graph.kernels.native || m_.packed) throw;
          if (refusal.empty()) refusal = error.what();
          if (!graph.kernels.leave_out(error.whole)) graph.kernels = {false, "", 0, std::string("native kernels cannot run it: ") + error.what()};
        }
      }
      if (!refusal.empty() && !is_automatic) {
        throw KernelsError(graph.path + ": native kernels cannot run it (onnxruntime's own kernels can): " + refusal);
      }
      check(graph);
      if (m_.quantized && (!graph.kernels.native || !graph.kernels.refused.empty()) && ort::loses_products(env_.get())) {
        throw ProviderError(graph.path + ": onnxruntime " + ort::version() + " multiplies integers wrongly on this processor: use onnxruntime " +
                            "1.25 or newer, native kernels, or a float32 bundle");
      }
    } catch (const ort::Failure& error) {
      if (!settings.is_cpu()) throw ProviderError(graph.path + ": " + settings.providers()[0].name + " did not start: " + error.what());
      throw BundleError(graph.path + ": onnxruntime refuses it: " + error.what());
    }
    return graph;
  }

  // Check that the names of the graph's inputs and outputs match the contract, and that the numbers in its metadata match the
  // manifest. Otherwise the graph belongs to another bundle.
  void check(const Graph& graph) const {
    const Names found = ort::input_names(*graph.session), given = ort::output_names(*graph.session);
    if (found != graph.inputs) throw BundleError(graph.path + ": inputs are " + joined(found, " ") + ", expected " + joined(graph.inputs, " "));
    for (const std::string& name : graph.outputs) {
      if (!std::count(given.begin(), given.end(), name)) throw BundleError(graph.path + ": outputs are " + joined(given, " ") + ", expected " + name);
    }
    const auto metadata = ort::made<OrtModelMetadata>(ort::api().SessionGetModelMetadata, static_cast<const OrtSession*>(graph.session.get()));
    if (ort::metadata(*metadata, "u2moe.version").empty()) return;
    const auto compare = [&](const auto& own, const auto& defaults) {
      own.each([&](const std::string& name, auto number, const Range&) {
        std::string text = ort::metadata(*metadata, "u2moe." + name);
        if (text.empty()) text = json_text(static_cast<double>(defaults.*number));
        if (parse_number(text) == static_cast<double>(own.*number)) return;
        throw BundleError(graph.path + ": u2moe." + name + " is " + text + ", which does not match bundle.json");
      });
    };
    compare(static_cast<const ModelNumbers&>(m_), ModelNumbers());
    compare(static_cast<const FeatureNumbers&>(m_), FeatureNumbers());
  }

  // Run a graph, and check the shapes of its outputs, since what follows reads that many numbers. A negative size stands for any.
  ort::Values run(const Graph& graph, const ort::Values& inputs, const std::vector<ort::Shape>& shapes) const {
    try {
      ort::Values found = ort::run(*graph.session, graph.inputs, inputs, graph.outputs);
      for (std::size_t i = 0; i < found.size(); ++i) {
        const bool is_count = graph.outputs[i] == "next_offset";
        const ort::Shape own = is_count ? ort::shape_of<std::int64_t>(*found[i]) : ort::shape_of<float>(*found[i]), &wanted = shapes[i];
        const auto fits = [](std::int64_t size, std::int64_t expected) { return expected < 0 || size == expected; };
        if (std::equal(own.begin(), own.end(), wanted.begin(), wanted.end(), fits)) continue;
        const char* const type = is_count ? "int64" : "float32";
        throw ProviderError(graph.path + ": output " + graph.outputs[i] + " is " + shown(own, type) + ", expected " + shown(wanted, type));
      }
      return found;
    } catch (const ort::Failure& error) {
      throw ProviderError(graph.path + ": onnxruntime failed: " + error.what());
    }
  }

  Manifest m_;
  std::optional<StaticEncoder> static_;  // of a bundle with fixed shapes
  Runner runner_;                        // empty: onnxruntime
  ort::Owned<OrtEnv> env_;
  Graph encoder_, ctc_, decoder_;
};

}  // namespace u2moe::runtime
