// The manifest of a bundle: sizes of the model, features, and defaults of decoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "endpoint.hpp"
#include "fusion.hpp"
#include "json.hpp"

namespace u2moe::runtime {

using Floats = std::vector<float>;  ///< samples, features, or what graphs give, row by row

constexpr double kLongestPaddingS = 10;

/// Refuses other names: a misspelled default would have no effect.
inline void check_names(const Json& json, const std::set<std::string>& known) {
  for (const auto& [name, value] : json.object()) {
    if (!known.count(name)) value.fail("no field of this name");
  }
}

/// Rules and the shortest pause (seconds; 0: none) that JSON names instead of those that are there.
/// @throws BundleError names the field.
inline void read_endpoint(const Json& json, EndpointRules& rules, double& pause) {
  check_names(json, {"rule1", "rule2", "rule3", "pause"});
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const std::string name = "rule" + std::to_string(i + 1);
    if (!json.has(name)) continue;
    rules[i] = std::nullopt;
    if (!json.given(name)) continue;
    const Json& given = json[name];
    check_names(given, {"must_contain_nonsilence", "min_trailing_silence", "min_utterance_length"});
    EndpointRule& rule = rules[i].emplace();
    rule.must_contain_nonsilence = given.has("must_contain_nonsilence") && given["must_contain_nonsilence"].boolean();
    rule.min_trailing_silence = given.number_or("min_trailing_silence", 0, 0, 1e9);
    rule.min_utterance_length = given.number_or("min_utterance_length", 0, 0, 1e9);
    if (!rule.is_valid()) given.fail("silence or a length above 0 seconds");
  }
  if (json.has("pause")) pause = json["pause"].is_null() ? 0 : json["pause"].number(kShortestPauseS, 1e9);
}

/// What a stream keeps from chunk to chunk in one tensor: zeros [blocks, 1, ...] at the start.
struct CacheLayout {
  std::string name;
  std::vector<std::int64_t> shape;
  std::ptrdiff_t time_axis = -1;  ///< the axis that grows with the cached frames; -1: its size is fixed
  double rate = 1;                ///< cached frames per encoder frame, where an axis grows
};

/// Names and meanings are those of bundle.json; see docs/export.md.
struct Manifest {
  bool streaming = false, has_decoder = false, bidirectional = false;
  int feature_size = 0, output_size = 0, num_blocks = 0, chunk_multiple = 0, vocab_size = 0, subsampling_rate = 0,
      right_context = 0, static_chunk_size = 0, blank = 0, sos = 0, eos = 0;
  int frame_reduction = 1;  ///< frames after the subsampling for one of the output
  std::vector<CacheLayout> caches;
  int sample_rate = 0, num_mel_bins = 0;
  int num_ceps = 0;  ///< coefficients of a frame of MFCC; 0: features are log-mel energies
  double frame_length_ms = 0, frame_shift_ms = 0;
  double ctc_weight = 0, reverse_weight = 0, padding_s = 0;  ///< like all up to `weights` defaults of StreamOptions
  int beam_size = 10;
  EndpointRules rules = kDefaultRules;
  double pause = kDefaultPauseS;
  std::string hotwords;               ///< lines for `parse_hotwords`
  std::string language_model;         ///< name of a file; empty: none
  LanguageModelOptions weights;       ///< of the language model
  bool calibrated = false;
  double scale = 1, bias = 0;  ///< of the log-odds of confidences, if calibrated
  bool quantized = false;
  int packed = 0;  ///< layout in which weights are packed for native kernels; 0: they are not

  int frame_len() const { return static_cast<int>(sample_rate * frame_length_ms / 1000); }  ///< samples
  int shift_len() const { return static_cast<int>(sample_rate * frame_shift_ms / 1000); }   ///< samples
  double frame_s() const { return subsampling_rate * frame_shift_ms / 1000; }               ///< seconds of an encoder frame

  /// The numbers that each graph also states, by their names in its metadata.
  std::vector<std::pair<std::string, double>> stated() const {
    std::vector<std::pair<std::string, double>> found = {
        {"sample_rate", sample_rate}, {"frame_length_ms", frame_length_ms}, {"frame_shift_ms", frame_shift_ms}};
    for (const Field& field : kFields) found.emplace_back(field.name, this->*field.value);
    return found;
  }

  /// @throws BundleError names the field, what was found and what was expected.
  static Manifest of(const Json& json) {
    if (!json.has("format") || json["format"].string() != "u2moe-bundle") json["format"].fail("'u2moe-bundle'");
    if (json["version"].number() != 4) json["version"].fail("4: use the u2moe that wrote the bundle, or export it again");
    const Json &model = json["model"], &features = json["features"], &decoding = json["decoding"], &calibration = json["calibration"];
    const std::string& decoder = model["decoder"].string();
    Manifest m;
    m.streaming = model["streaming"].boolean();
    m.bidirectional = decoder == "bitransformer";
    m.has_decoder = m.bidirectional || decoder == "transformer";
    if (!m.has_decoder && decoder != "none") model["decoder"].fail("'bitransformer', 'transformer' or 'none'");
    for (const Field& field : kFields) m.*field.value = model[field.name].integer(field.least, 1 << 20);
    if (model.has("frame_reduction")) m.frame_reduction = model["frame_reduction"].integer(1, m.subsampling_rate);
    for (const Json& each : model["caches"].array()) {
      CacheLayout& cache = m.caches.emplace_back();
      cache = {each["name"].string(), {each["num_blocks"].integer(1, 1 << 20), 1}, -1, each["rate"].number(1e-3, 1e3)};
      for (const Json& size : each["shape"].array()) {
        if (size.integer(0, 1 << 20) == 0) cache.time_axis = static_cast<std::ptrdiff_t>(cache.shape.size());
        cache.shape.push_back(size.integer(0, 1 << 20));
      }
    }
    for (const char* token : {"blank", "sos", "eos"}) model[token].integer(0, m.vocab_size - 1);
    m.sample_rate = features["sample_rate"].integer(1000, 384000);
    m.frame_length_ms = features["frame_length_ms"].number(1, 1000);
    m.frame_shift_ms = features["frame_shift_ms"].number(1, m.frame_length_ms);
    m.num_mel_bins = features["num_mel_bins"].integer(3, 1000);
    if (features.has("num_ceps")) m.num_ceps = features["num_ceps"].integer(0, m.num_mel_bins);
    const Json& size = features[m.num_ceps > 0 ? "num_ceps" : "num_mel_bins"];
    if (size.number() != m.feature_size) size.fail("feature_size of the model, " + std::to_string(m.feature_size));
    m.ctc_weight = decoding["ctc_weight"].number(0, 1e9);
    m.reverse_weight = decoding["reverse_weight"].number(0, 1);
    check_names(decoding, {"ctc_weight", "reverse_weight", "beam_size", "padding_s", "endpoint", "hotwords", "language_model"});
    if (decoding.has("beam_size")) m.beam_size = decoding["beam_size"].integer(1, 1000);
    if (decoding.has("endpoint")) read_endpoint(decoding["endpoint"], m.rules, m.pause);
    if (decoding.has("hotwords")) {
      for (const Json& line : decoding["hotwords"].array()) m.hotwords += line.string() + "\n";
    }
    if (decoding.given("language_model")) {
      const Json& given = decoding["language_model"];
      check_names(given, {"file", "weight", "word_bonus", "unknown_score", "rescoring_weight", "level"});
      m.language_model = given["file"].string();
      if (!json["files"].has(m.language_model)) given["file"].fail("a file that the bundle lists");
      for (const auto& [name, value, least, most] : m.weights.kNumbers) m.weights.*value = given.number_or(name, m.weights.*value, least, most);
      if (given.given("level")) m.weights.level = given["level"].string();
      if (m.weights.level != "" && m.weights.level != "word" && m.weights.level != "token") given["level"].fail("'word', 'token' or null");
    }
    m.padding_s = decoding.number_or("padding_s", 0, 0, kLongestPaddingS);
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

 private:
  struct Field {
    const char* name;
    int Manifest::*value;
    int least;
  };
  static const Field kFields[11];
};

inline constexpr Manifest::Field Manifest::kFields[] = {
    {"feature_size", &Manifest::feature_size, 1}, {"output_size", &Manifest::output_size, 1},
    {"num_blocks", &Manifest::num_blocks, 1}, {"chunk_multiple", &Manifest::chunk_multiple, 1},
    {"vocab_size", &Manifest::vocab_size, 1}, {"subsampling_rate", &Manifest::subsampling_rate, 1},
    {"right_context", &Manifest::right_context, 0}, {"static_chunk_size", &Manifest::static_chunk_size, 0},
    {"blank", &Manifest::blank, 0}, {"sos", &Manifest::sos, 0}, {"eos", &Manifest::eos, 0}};

}  // namespace u2moe::runtime
