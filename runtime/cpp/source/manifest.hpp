// The manifest of a bundle: model sizes, features and decoding defaults.
#pragma once

#include <memory>

#include "endpoint.hpp"
#include "front_end.hpp"
#include "fusion.hpp"

namespace u2moe::runtime {

using Floats = std::vector<float>;  ///< samples, features or graph outputs, row by row

/// Whether a name can only refer to a file directly inside a folder, on any system.
inline bool is_plain_name(const std::string& name) {
  const auto is_odd = [](char c) { return static_cast<unsigned char>(c) < 32 || std::string_view("/\\:*?\"<>|").find(c) != std::string_view::npos; };
  if (name.empty() || name.back() == '.' || name.back() == ' ' || std::any_of(name.begin(), name.end(), is_odd)) return false;
  const std::string stem = mapped(name.substr(0, name.find('.')), lower);
  for (const char* device : {"con", "prn", "aux", "nul"}) {  // reserved on Windows, with any suffix
    if (stem == device) return false;
  }
  return !(stem.size() == 4 && (stem.compare(0, 3, "com") == 0 || stem.compare(0, 3, "lpt") == 0) && stem[3] >= '0' && stem[3] <= '9');
}

/// Where utterances end; see EndpointConfig in Python.
struct EndpointOptions {
  EndpointRules rules;
  double pause = 0;  ///< shortest pause in seconds at which recordings are cut; 0: off
  double turn = 0;   ///< threshold for the probability of a sentence end; 0: off

  /// Read a complete EndpointConfig.
  /// @throws BundleError if a rule would fire at every frame.
  void read(const Json& json) {
    for (std::size_t i = 0; i < rules.size(); ++i) {
      const Json& given = json["rule" + std::to_string(i + 1)];
      rules[i].reset();
      if (given.is_null()) continue;
      rules[i] = {given["must_contain_nonsilence"].boolean(), given["min_trailing_silence"].number(0, 1e9), given["min_utterance_length"].number(0, 1e9)};
      if (!rules[i]->is_valid()) given.fail("silence or a length above 0 seconds");
    }
    pause = json["pause"].is_null() ? 0 : json["pause"].number(kShortestPauseS, 1e9);
    turn = json["turn"].is_null() ? 0 : json["turn"].number(1e-9, 1);
  }
};

/// Maximum numbers in a cache at the start of a stream, and in an input of fixed shape.
constexpr double kMostNumbers = 1 << 28;

/// Numbers in a tensor of a shape in which growing axes count as 1.
inline double num_numbers(const std::vector<std::int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), 1.0, [](double num, std::int64_t size) { return num * std::max(static_cast<double>(size), 1.0); });
}

/// Layout of a state tensor [blocks, 1, ...] that a stream passes from chunk to chunk. The tensor is zero at first.
struct CacheLayout {
  std::string name;
  std::vector<std::int64_t> shape;
  std::ptrdiff_t time_axis = -1;  ///< axis that grows with the cached frames; -1: fixed size
  double rate = 1;                ///< cached frames per encoder frame along the growing axis

  std::int64_t num_cached(std::int64_t num_frames) const { return static_cast<std::int64_t>(std::ceil(static_cast<double>(num_frames) * rate)); }
};

/// Layout of `static.onnx`, an encoder with fixed shapes. See StaticForm in runtime/bundle/manifest.py.
struct StaticForm {
  struct Rate {
    std::int64_t step;
    std::string mask, positions;
  };
  struct History {
    std::string start;
    std::vector<std::int64_t> steps;
  };

  explicit StaticForm(const Json& json)
      : chunk_size(json["chunk_size"].integer(1, 10000)), num_left_chunks(json["num_left_chunks"].integer(1, 10000)),
        first_position(json["first_position"].integer(0, 1 << 20)), interleaved(json["interleaved"].boolean()) {
    for (const Json& each : json["rates"].array()) rates.push_back({each["step"].integer(1, 1000), each["mask"].string(), each["positions"].string()});
    for (const Json& each : json["histories"].array()) {
      History& own = histories[each["cache"].string()];
      own.start = each["start"].string();
      for (const Json& step : each["steps"].array()) own.steps.push_back(step.integer(1, 1000));
    }
    for (const Json& each : json["frequencies"].array()) frequencies.push_back(static_cast<float>(each.number()));
  }

  std::int64_t chunk_size, num_left_chunks, first_position;
  std::vector<Rate> rates;
  std::map<std::string, History> histories;
  Floats frequencies;
  bool interleaved;
};

/// The fields of bundle.json; see docs/export.md.
struct Manifest : ModelNumbers, FeatureNumbers, EndpointOptions {
  bool streaming = false, has_decoder = false, bidirectional = false;
  std::shared_ptr<const FrontEnd> front_end;
  std::vector<CacheLayout> caches;
  std::optional<StaticForm> form;  ///< layout of an encoder with fixed shapes, if there is one
  StreamNumbers numbers;  ///< these members, down to `weights`, are defaults of StreamOptions
  std::string hotwords;          ///< lines for `parse_hotwords`
  std::string language_model;    ///< file name; empty: none
  LanguageModelOptions weights;  ///< fusion weights of the language model
  bool calibrated = false;
  double scale = 1, bias = 0;  ///< calibration of confidences: factor and offset of their log-odds
  bool quantized = false;
  int packed = 0;                     ///< layout of weights packed for native kernels; 0: not packed
  std::vector<std::string> warnings;  ///< about unknown fields that are ignored, and about random weights

  int frame_len() const { return static_cast<int>(sample_rate * frame_length_ms / 1000); }  ///< samples
  int shift_len() const { return static_cast<int>(sample_rate * frame_shift_ms / 1000); }   ///< samples
  double frame_s() const { return subsampling_rate * frame_shift_ms / 1000; }               ///< seconds per encoder frame

  /// @param given content of bundle.json. Missing fields are filled with their defaults.
  /// @throws BundleError that names the field, the value found and the value expected.
  static Manifest of(Json& given) {
    if (!given.has("format") || given["format"].string() != "u2moe-bundle") given["format"].fail("'u2moe-bundle'");
    if (given["version"].number() != kFormatVersion) {
      given["version"].fail(std::to_string(kFormatVersion) + ": use the u2moe that wrote the bundle, or export it again");
    }
    given.fields().erase("format");
    Records records(given["producer"].string());
    given = records.completed(std::move(given), "Manifest");
    const Json& json = given;
    for (const auto& [name, digest] : json["files"].object()) {
      if (!is_plain_name(name)) fail<BundleError>(json["files"].path() + ": found '" + name.substr(0, 200) + "', expected a plain file name without folders");
    }
    const Json &model = json["model"], &features = json["features"], &decoding = json["decoding"], &calibration = json["calibration"];
    const std::string& decoder = model["decoder"].string();
    Manifest m;
    m.warnings = std::move(records.warnings);
    if (json["random_weights"].boolean()) m.warnings.push_back("random weights, for measuring only");
    m.streaming = model["streaming"].boolean();
    m.bidirectional = decoder == "bitransformer";
    m.has_decoder = m.bidirectional || decoder == "transformer";
    if (!m.has_decoder && decoder != "none") model["decoder"].fail("'bitransformer', 'transformer' or 'none'");
    read_numbers<ModelNumbers>(model, m);
    for (const char* token : {"blank", "sos", "eos"}) model[token].integer(0, m.vocab_size - 1);
    model["frame_reduction"].integer(1, m.subsampling_rate);
    if (model.given("static")) m.form.emplace(model["static"]);
    for (const Json& each : model["caches"].array()) {
      CacheLayout& cache = m.caches.emplace_back();
      cache = {each["name"].string(), {each["num_blocks"].integer(1, 1 << 20), 1}, -1, each["rate"].number(1e-3, m.frame_reduction)};
      const Json& shape = each["shape"];
      for (const Json& size : shape.array()) {
        if (size.integer(0, 1 << 20) == 0 && cache.time_axis >= 0) shape.fail("at most one axis that grows");
        if (size.integer(0, 1 << 20) == 0) cache.time_axis = static_cast<std::ptrdiff_t>(cache.shape.size());
        cache.shape.push_back(size.integer(0, 1 << 20));
      }
      const bool is_known = cache.time_axis < 0 ? cache.shape.size() == 4 : cache.shape.size() == 5 && cache.time_axis == 3;
      if (m.form && !is_known) shape.fail("[channels, frames] or [heads, 0, width] in a bundle of fixed shape");
      if (num_numbers(cache.shape) > kMostNumbers) shape.fail("at most " + shown_number(kMostNumbers) + " numbers in a cache");
    }
    read_numbers<FeatureNumbers>(features, m);
    features["frame_shift_ms"].number(1, m.frame_length_ms);
    const Json& size = features[m.num_ceps > 0 ? "num_ceps" : "num_mel_bins"];
    if (size.number() != m.feature_size) size.fail("feature_size of the model, " + std::to_string(m.feature_size));
    m.front_end = m.front_end_of(features);
    read_numbers(decoding, m.numbers);
    m.read(decoding["endpoint"]);
    for (const Json& line : decoding["hotwords"].array()) m.hotwords += line.string() + "\n";
    if (decoding.given("language_model")) {
      const Json& own = decoding["language_model"];
      m.language_model = own["file"].string();
      if (!json["files"].has(m.language_model)) own["file"].fail("a file that the bundle lists");
      m.weights.read(own);
    }
    m.calibrated = !calibration.is_null();
    if (m.calibrated) {
      m.scale = calibration["scale"].number(1e-9, 1e9);
      m.bias = calibration["bias"].number();
    }
    const Json& quantization = json["quantization"];
    m.quantized = !quantization.object().empty();
    if (quantization.given("packed")) m.packed = quantization["packed"].integer(1, 1000);
    return m;
  }

  /// Return the front end of these numbers and of the other fields of a complete FeatureConfig.
  /// @throws BundleError if it is impossible.
  std::shared_ptr<const FrontEnd> front_end_of(const Json& features) const {
    const std::string& window = features["window"].string();
    if (!FrontEnd::knows(window)) features["window"].fail("'povey', 'hamming', 'hanning', 'blackman' or 'rectangular'");
    const double low = features["low_hz"].number(), high = features["high_hz"].number(), top = high > 0 ? high : sample_rate / 2.0 + high;
    if (!(low >= 0 && low < top && top <= sample_rate / 2.0)) features["low_hz"].fail("0 or more, and less than high_hz, which may be half the sample_rate");
    const auto found = std::make_shared<const FrontEnd>(sample_rate, frame_len(), shift_len(), num_mel_bins, num_ceps, window, low, top);
    if (!found->is_possible()) features["num_mel_bins"].fail("fewer bands, or longer frames: a mel band contains no FFT bin");
    return found;
  }
};

}  // namespace u2moe::runtime
