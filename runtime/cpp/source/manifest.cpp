#include "manifest.hpp"

#include <set>

namespace u2moe::runtime {
namespace {

// A misspelled default would have no effect.
void check_names(const Json& json, const std::set<std::string>& known) {
  for (const auto& [name, value] : json.object()) {
    if (!known.count(name)) value.fail("no field of this name");
  }
}

std::optional<EndpointRule> rule(const Json& json) {
  if (json.is_null()) return std::nullopt;
  check_names(json, {"must_contain_nonsilence", "min_trailing_silence", "min_utterance_length"});
  EndpointRule rule;
  if (json.has("must_contain_nonsilence")) rule.must_contain_nonsilence = json["must_contain_nonsilence"].boolean();
  if (json.has("min_trailing_silence")) rule.min_trailing_silence = json["min_trailing_silence"].number(0, 1e9);
  if (json.has("min_utterance_length")) rule.min_utterance_length = json["min_utterance_length"].number(0, 1e9);
  if (!rule.is_valid()) json.fail("silence or a length above 0 seconds");
  return rule;
}

void read_language_model(const Json& json, const Json& files, Manifest& m) {
  if (json.is_null()) return;
  check_names(json, {"file", "weight", "word_bonus", "unknown_score", "rescoring_weight", "level"});
  m.language_model = json["file"].string();
  if (!files.has(m.language_model)) json["file"].fail("a file that the bundle lists");
  if (json.has("weight")) m.weights.weight = json["weight"].number(0, 100);
  if (json.has("word_bonus")) m.weights.word_bonus = json["word_bonus"].number(-100, 100);
  if (json.has("unknown_score")) m.weights.unknown_score = json["unknown_score"].number(-1000, 0);
  if (json.has("rescoring_weight")) m.weights.rescoring_weight = json["rescoring_weight"].number(0, 100);
  if (json.has("level") && !json["level"].is_null()) m.weights.level = json["level"].string();
  if (m.weights.level != "" && m.weights.level != "word" && m.weights.level != "token") json["level"].fail("'word', 'token' or null");
}

CacheLayout layout(const Json& json) {
  CacheLayout cache{json["name"].string(), {json["num_blocks"].integer(1, 1 << 20), 1}, -1, json["rate"].number(1e-3, 1e3)};
  for (const Json& size : json["shape"].array()) {
    if (size.integer(0, 1 << 20) == 0) cache.time_axis = static_cast<std::ptrdiff_t>(cache.shape.size());
    cache.shape.push_back(size.integer(0, 1 << 20));
  }
  return cache;
}

}  // namespace

void read_endpoint(const Json& json, EndpointRules& rules, double& pause) {
  check_names(json, {"rule1", "rule2", "rule3", "pause"});
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const std::string name = "rule" + std::to_string(i + 1);
    if (json.has(name)) rules[i] = rule(json[name]);
  }
  if (json.has("pause")) pause = json["pause"].is_null() ? 0 : json["pause"].number(kShortestPauseS, 1e9);
}

std::vector<std::pair<std::string, double>> Manifest::stated() const {
  std::vector<std::pair<std::string, double>> found = {
      {"sample_rate", sample_rate}, {"frame_length_ms", frame_length_ms}, {"frame_shift_ms", frame_shift_ms}};
  for (const Field& field : fields()) found.emplace_back(field.name, this->*field.value);
  return found;
}

Manifest Manifest::of(const Json& json) {
  if (!json.has("format") || json["format"].string() != "u2moe-bundle") json["format"].fail("'u2moe-bundle'");
  if (json["version"].number() != 4) json["version"].fail("4: use the u2moe that wrote the bundle, or export it again");
  const Json &model = json["model"], &features = json["features"], &decoding = json["decoding"], &calibration = json["calibration"];
  const std::string& decoder = model["decoder"].string();
  Manifest m;
  m.streaming = model["streaming"].boolean();
  m.bidirectional = decoder == "bitransformer";
  m.has_decoder = m.bidirectional || decoder == "transformer";
  if (!m.has_decoder && decoder != "none") model["decoder"].fail("'bitransformer', 'transformer' or 'none'");
  for (const Field& field : fields()) m.*field.value = model[field.name].integer(field.least, 1 << 20);
  if (model.has("frame_reduction")) m.frame_reduction = model["frame_reduction"].integer(1, m.subsampling_rate);
  for (const Json& cache : model["caches"].array()) m.caches.push_back(layout(cache));
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
  if (decoding.has("language_model")) read_language_model(decoding["language_model"], json["files"], m);
  if (decoding.has("padding_s")) m.padding_s = decoding["padding_s"].number(0, kLongestPaddingS);
  m.calibrated = !calibration.is_null();
  if (m.calibrated) {
    m.scale = calibration["scale"].number(1e-9, 1e9);
    m.bias = calibration["bias"].number();
  }
  const Json& quantization = json["quantization"];
  m.quantized = !quantization.object().empty();
  if (quantization.has("packed") && !quantization["packed"].is_null()) m.packed = quantization["packed"].integer(1, 1000);
  return m;
}

const std::vector<Manifest::Field>& Manifest::fields() {
  static const std::vector<Field> all = {
      {"feature_size", &Manifest::feature_size, 1}, {"output_size", &Manifest::output_size, 1},
      {"num_blocks", &Manifest::num_blocks, 1}, {"chunk_multiple", &Manifest::chunk_multiple, 1},
      {"vocab_size", &Manifest::vocab_size, 1}, {"subsampling_rate", &Manifest::subsampling_rate, 1},
      {"right_context", &Manifest::right_context, 0}, {"static_chunk_size", &Manifest::static_chunk_size, 0},
      {"blank", &Manifest::blank, 0}, {"sos", &Manifest::sos, 0}, {"eos", &Manifest::eos, 0}};
  return all;
}

}  // namespace u2moe::runtime
