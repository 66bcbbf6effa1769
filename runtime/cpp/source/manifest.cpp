#include "manifest.hpp"

namespace u2moe::runtime {
namespace {

CacheLayout layout(const Json& json) {
  CacheLayout cache{json["name"].string(), {json["num_blocks"].integer(1, 1 << 20), 1}, -1, json["rate"].number(1e-3, 1e3)};
  for (const Json& size : json["shape"].array()) {
    if (size.integer(0, 1 << 20) == 0) cache.time_axis = static_cast<std::ptrdiff_t>(cache.shape.size());
    cache.shape.push_back(size.integer(0, 1 << 20));
  }
  return cache;
}

}  // namespace

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
  if (json.has("padding_s")) m.padding_s = json["padding_s"].number(0, kLongestPaddingS);  // until demo models are replaced
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
