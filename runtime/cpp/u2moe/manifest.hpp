// The manifest of a bundle: what a runtime must know to run its graphs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "json.hpp"

namespace u2moe {

constexpr double kLongestPaddingS = 10;

/// Names and meanings are those of bundle.json; see docs/export.md.
struct Manifest {
  bool convolution = false, has_decoder = false, bidirectional = false, quantized = false;
  int feature_size = 0, output_size = 0, num_blocks = 0, num_kv_heads = 0, kv_dim = 0, conv_dim = 0, conv_cache = 0,
      vocab_size = 0, subsampling_rate = 0, right_context = 0, static_chunk_size = 0, blank = 0, eos = 0;
  int sample_rate = 0;
  double frame_length_ms = 0, frame_shift_ms = 0;
  double ctc_weight = 0, reverse_weight = 0;
  double padding_s = 0;  ///< default of StreamOptions::padding_s
  bool calibrated = false;
  double scale = 1, bias = 0;  ///< of the log-odds of confidences, if calibrated

  int frame_len() const { return static_cast<int>(sample_rate * frame_length_ms / 1000); }  ///< samples
  int shift_len() const { return static_cast<int>(sample_rate * frame_shift_ms / 1000); }   ///< samples
  double frame_s() const { return subsampling_rate * frame_shift_ms / 1000; }               ///< seconds of an encoder frame

  /// The numbers that each graph also states, by their names in its metadata.
  std::vector<std::pair<std::string, double>> stated() const {
    return {{"feature_size", feature_size}, {"output_size", output_size}, {"num_blocks", num_blocks},
            {"num_kv_heads", num_kv_heads}, {"kv_dim", kv_dim}, {"conv_dim", conv_dim}, {"conv_cache", conv_cache},
            {"vocab_size", vocab_size}, {"subsampling_rate", subsampling_rate}, {"right_context", right_context},
            {"static_chunk_size", static_chunk_size}, {"blank", blank}, {"eos", eos},
            {"sample_rate", sample_rate}, {"frame_length_ms", frame_length_ms}, {"frame_shift_ms", frame_shift_ms}};
  }

  /// @throws BundleError names the field, what was found and what was expected.
  static Manifest of(const Json& json) {
    if (!json.has("format") || json["format"].string() != "u2moe-bundle") json["format"].fail("'u2moe-bundle'");
    if (json["version"].number() != 3) json["version"].fail("3: use the u2moe that wrote the bundle, or export it again");
    Manifest m;
    m.set_model(json["model"]);
    m.set_features(json["features"]);
    m.ctc_weight = json["decoding"]["ctc_weight"].number(0, 1e9);
    m.reverse_weight = json["decoding"]["reverse_weight"].number(0, 1);
    if (json.has("padding_s")) m.padding_s = json["padding_s"].number(0, kLongestPaddingS);
    m.quantized = json.has("quantization") && !json["quantization"].object().empty();
    if (json.has("calibration") && !json["calibration"].is_null()) {
      m.calibrated = true;
      m.scale = json["calibration"]["scale"].number(1e-9, 1e9);
      m.bias = json["calibration"]["bias"].number();
    }
    return m;
  }

 private:
  static constexpr int kLargest = 1 << 20;

  void set_model(const Json& json) {
    if (!json["streaming"].boolean()) json["streaming"].fail("true: this program recognises in chunks only");
    convolution = json["convolution"].boolean();
    const std::string decoder = json["decoder"].string();
    bidirectional = decoder == "bitransformer";
    has_decoder = decoder != "none";
    if (!bidirectional && has_decoder && decoder != "transformer") json["decoder"].fail("'bitransformer', 'transformer' or 'none'");
    feature_size = json["feature_size"].integer(1, kLargest);
    output_size = json["output_size"].integer(1, kLargest);
    num_blocks = json["num_blocks"].integer(1, kLargest);
    num_kv_heads = json["num_kv_heads"].integer(0, kLargest);
    kv_dim = json["kv_dim"].integer(0, kLargest);
    conv_dim = json["conv_dim"].integer(0, kLargest);
    conv_cache = json["conv_cache"].integer(0, kLargest);
    vocab_size = json["vocab_size"].integer(1, kLargest);
    subsampling_rate = json["subsampling_rate"].integer(1, kLargest);
    right_context = json["right_context"].integer(0, kLargest);
    static_chunk_size = json["static_chunk_size"].integer(0, kLargest);
    blank = json["blank"].integer(0, vocab_size - 1);
    eos = json["eos"].integer(0, vocab_size - 1);
  }

  void set_features(const Json& json) {
    sample_rate = json["sample_rate"].integer(1000, 384000);
    frame_length_ms = json["frame_length_ms"].number(1, 1000);
    frame_shift_ms = json["frame_shift_ms"].number(1, frame_length_ms);
    if (json["num_mel_bins"].number() != feature_size) {
      json["num_mel_bins"].fail("feature_size of the model, " + std::to_string(feature_size));
    }
  }
};

}  // namespace u2moe
