// A bundle on disk: its manifest, and its files, each compared with its digest.
#pragma once

#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.hpp"
#include "sha256.hpp"
#include "vocabulary.hpp"

namespace u2moe {

struct Manifest {
  bool convolution, bidirectional, has_decoder;
  int feature_size, output_size, num_blocks, num_kv_heads, kv_dim, conv_dim, conv_cache, vocab_size, subsampling_rate,
      right_context, static_chunk_size, blank, eos, max_position;
  int sample_rate;
  double frame_length_ms, frame_shift_ms;
  double ctc_weight, reverse_weight;
  bool calibrated = false;
  double scale = 1, bias = 0;  // of the log-odds of confidences

  int frame_len() const { return static_cast<int>(sample_rate * frame_length_ms / 1000); }
  int shift_len() const { return static_cast<int>(sample_rate * frame_shift_ms / 1000); }
  double frame_s() const { return subsampling_rate * frame_shift_ms / 1000; }
};

class Bundle {
 public:
  explicit Bundle(const std::string& folder) : folder_(folder) {
    const std::vector<char> content = read("bundle.json");
    json_ = Json::parse(std::string(content.begin(), content.end()));
    if (!json_.has("format") || json_["format"].string() != "u2moe-bundle") fail("bundle.json: is not the manifest of a bundle");
    if (json_["version"].integer() != 1) fail("bundle.json: version is not 1");
    const Json& m = json_["model"];
    if (!m["streaming"].boolean()) fail("bundle.json: this encoder cannot stream");
    manifest.convolution = m["convolution"].boolean();
    manifest.bidirectional = m["decoder"].string() == "bitransformer";
    manifest.has_decoder = m["decoder"].string() != "none";
    manifest.max_position = m.has("max_position") ? m["max_position"].integer() : 5000;
    for (auto [name, value] : std::initializer_list<std::pair<const char*, int*>>{
             {"feature_size", &manifest.feature_size}, {"output_size", &manifest.output_size},
             {"num_blocks", &manifest.num_blocks}, {"num_kv_heads", &manifest.num_kv_heads}, {"kv_dim", &manifest.kv_dim},
             {"conv_dim", &manifest.conv_dim}, {"conv_cache", &manifest.conv_cache}, {"vocab_size", &manifest.vocab_size},
             {"subsampling_rate", &manifest.subsampling_rate}, {"right_context", &manifest.right_context},
             {"static_chunk_size", &manifest.static_chunk_size}, {"blank", &manifest.blank}, {"eos", &manifest.eos}}) {
      *value = m[name].integer();
      if (*value < 0) fail(std::string("bundle.json: ") + name + " is negative");
    }
    const Json &features = json_["features"], &decoding = json_["decoding"];
    manifest.sample_rate = features["sample_rate"].integer();
    manifest.frame_length_ms = features["frame_length_ms"].number();
    manifest.frame_shift_ms = features["frame_shift_ms"].number();
    if (manifest.shift_len() < 1 || manifest.subsampling_rate < 1) fail("bundle.json: frames are impossible");
    manifest.ctc_weight = decoding["ctc_weight"].number();
    manifest.reverse_weight = decoding["reverse_weight"].number();
    if (json_.has("calibration") && !json_["calibration"].is_null()) {
      manifest.calibrated = true;
      manifest.scale = json_["calibration"]["scale"].number();
      manifest.bias = json_["calibration"]["bias"].number();
    }
    const std::vector<char> tokens = verified("tokens.txt");
    vocabulary = Vocabulary::parse(std::string(tokens.begin(), tokens.end()), manifest.vocab_size);
  }

  bool has(const std::string& name) const { return json_["files"].has(name); }

  // The content of a file, after its size and sha256 have been compared with the manifest.
  std::vector<char> verified(const std::string& name) const {
    const Json& digest = json_["files"][name];
    std::vector<char> content = read(name);
    if (static_cast<double>(content.size()) != digest["size"].number()) fail(name + ": its size differs from the manifest");
    const std::string found = Sha256::hex_of(content);
    if (found != digest["sha256"].string()) fail(name + ": sha256 is " + found + ", expected " + digest["sha256"].string());
    return content;
  }

  Manifest manifest;
  Vocabulary vocabulary;

 private:
  [[noreturn]] void fail(const std::string& message) const { throw std::runtime_error(folder_ + "/" + message); }

  std::vector<char> read(const std::string& name) const {
    std::ifstream file(folder_ + "/" + name, std::ios::binary | std::ios::ate);
    if (!file) fail(name + ": cannot be read");
    std::vector<char> content(static_cast<std::size_t>(file.tellg()));
    file.seekg(0);
    if (!file.read(content.data(), static_cast<std::streamsize>(content.size()))) fail(name + ": cannot be read");
    return content;
  }

  std::string folder_;
  Json json_;
};

}  // namespace u2moe
