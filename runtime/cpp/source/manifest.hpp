// The manifest of a bundle: sizes of the model, features, and defaults of decoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "endpoint.hpp"
#include "fusion.hpp"
#include "json.hpp"

namespace u2moe::runtime {

using Floats = std::vector<float>;  ///< samples, features, or what graphs give, row by row

constexpr double kLongestPaddingS = 10;

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
  std::vector<std::pair<std::string, double>> stated() const;

  /// @throws BundleError names the field, what was found and what was expected.
  static Manifest of(const Json& json);

 private:
  struct Field {
    const char* name;
    int Manifest::*value;
    int least;
  };

  static const std::vector<Field>& fields();
};

/// Rules and the shortest pause (seconds; 0: none) that JSON names instead of those that are there.
/// @throws BundleError names the field.
void read_endpoint(const Json& json, EndpointRules& rules, double& pause);

}  // namespace u2moe::runtime
