// What Python declares. Written by runtime/cpp/declared.py: do not change it here.
#pragma once

#include <cstddef>

#include "u2moe.h"

namespace u2moe::runtime {

constexpr int kFormatVersion = 4, kKernelsContract = 3;
constexpr int kStreamChunkSize = 16;
constexpr double kShortestPauseS = 0.4;
constexpr double kHotwordWeight = 1.5, kMostHotwordWeight = 100;
constexpr std::size_t kLongestHotword = 200;
constexpr float kRestPenalty = 0.5F;
constexpr double kRestCost = 3.0;
constexpr std::size_t kMinGrammarTokens = 32, kMostPlaces = 262144;
constexpr std::size_t kLongestGrammarLine = 20000;

enum class Search { kDefault, kAttentionRescoring, kCtcPrefixBeam, kCtcGreedy, kAttention };
struct SearchName {
  const char* name;
  Search search;
  bool has_beam;
};
constexpr SearchName kSearches[] = {{"attention_rescoring", Search::kAttentionRescoring, true}, {"ctc_prefix_beam", Search::kCtcPrefixBeam, true}, {"ctc_greedy", Search::kCtcGreedy, false}, {"attention", Search::kAttention, false}};

/// What a number may be, and whether a bundle may choose its default.
struct Range {
  double least, most;
  bool in_bundle;
};

struct ModelNumbers {
  int feature_size = 0;
  int output_size = 0;
  int num_blocks = 0;
  int vocab_size = 0;
  int subsampling_rate = 0;
  int right_context = 0;
  int static_chunk_size = 0;
  int blank = 0;
  int sos = 0;
  int eos = 0;
  int chunk_multiple = 1;
  int frame_reduction = 1;
  int max_position = 5000;

  template <class Use>
  static void each(Use use) {
    use("feature_size", &ModelNumbers::feature_size, Range{1, 1000000, false});
    use("output_size", &ModelNumbers::output_size, Range{1, 1000000, false});
    use("num_blocks", &ModelNumbers::num_blocks, Range{1, 1000000, false});
    use("vocab_size", &ModelNumbers::vocab_size, Range{1, 1000000, false});
    use("subsampling_rate", &ModelNumbers::subsampling_rate, Range{1, 1000000, false});
    use("right_context", &ModelNumbers::right_context, Range{0, 1000000, false});
    use("static_chunk_size", &ModelNumbers::static_chunk_size, Range{0, 1000000, false});
    use("blank", &ModelNumbers::blank, Range{0, 1000000, false});
    use("sos", &ModelNumbers::sos, Range{0, 1000000, false});
    use("eos", &ModelNumbers::eos, Range{0, 1000000, false});
    use("chunk_multiple", &ModelNumbers::chunk_multiple, Range{1, 1000000, false});
    use("frame_reduction", &ModelNumbers::frame_reduction, Range{1, 1000000, false});
    use("max_position", &ModelNumbers::max_position, Range{1, 1000000, false});
  }
};

struct FeatureNumbers {
  int sample_rate = 16000;
  int num_mel_bins = 80;
  double frame_length_ms = 25;
  double frame_shift_ms = 10;
  int num_ceps = 0;

  template <class Use>
  static void each(Use use) {
    use("sample_rate", &FeatureNumbers::sample_rate, Range{1000, 384000, false});
    use("num_mel_bins", &FeatureNumbers::num_mel_bins, Range{3, 1000, false});
    use("frame_length_ms", &FeatureNumbers::frame_length_ms, Range{1, 1000, false});
    use("frame_shift_ms", &FeatureNumbers::frame_shift_ms, Range{1, 1000, false});
    use("num_ceps", &FeatureNumbers::num_ceps, Range{0, 1000, false});
  }
};

struct StreamNumbers {
  double ctc_weight = 0.3;
  double reverse_weight = 0.3;
  int beam_size = 10;
  double padding_s = 0;
  double blank_penalty = 0;
  double length_penalty = 0;
  int num_left_chunks = -1;

  template <class Use>
  static void each(Use use) {
    use("ctc_weight", &StreamNumbers::ctc_weight, Range{0, 1000000000, true}, &u2moe_stream_options::ctc_weight);
    use("reverse_weight", &StreamNumbers::reverse_weight, Range{0, 1, true}, &u2moe_stream_options::reverse_weight);
    use("beam_size", &StreamNumbers::beam_size, Range{1, 1000, true}, &u2moe_stream_options::beam_size);
    use("padding_s", &StreamNumbers::padding_s, Range{0, 10, true}, &u2moe_stream_options::padding_s);
    use("blank_penalty", &StreamNumbers::blank_penalty, Range{0, 10, true}, &u2moe_stream_options::blank_penalty);
    use("length_penalty", &StreamNumbers::length_penalty, Range{-10, 10, false}, &u2moe_stream_options::length_penalty);
    use("num_left_chunks", &StreamNumbers::num_left_chunks, Range{-1, 1000000, false}, &u2moe_stream_options::num_left_chunks);
  }
};

struct LanguageModelNumbers {
  double weight = 0.5;
  double word_bonus = 0.5;
  double unknown_score = -5;
  double rescoring_weight = 1;

  template <class Use>
  static void each(Use use) {
    use("weight", &LanguageModelNumbers::weight, Range{0, 100, false}, &u2moe_language_model_options::weight);
    use("word_bonus", &LanguageModelNumbers::word_bonus, Range{-100, 100, false}, &u2moe_language_model_options::word_bonus);
    use("unknown_score", &LanguageModelNumbers::unknown_score, Range{-1000, 0, false}, &u2moe_language_model_options::unknown_score);
    use("rescoring_weight", &LanguageModelNumbers::rescoring_weight, Range{0, 100, false}, &u2moe_language_model_options::rescoring_weight);
  }
};

struct VadNumbers {
  double threshold = 0.5;
  double end_threshold = 0.35;
  double min_silence = 0.6;
  double padding = 0.3;

  template <class Use>
  static void each(Use use) {
    use("threshold", &VadNumbers::threshold, Range{1e-09, 1, false}, &u2moe_vad_options::threshold);
    use("end_threshold", &VadNumbers::end_threshold, Range{1e-09, 1, false}, &u2moe_vad_options::end_threshold);
    use("min_silence", &VadNumbers::min_silence, Range{1e-09, 1000000000, false}, &u2moe_vad_options::min_silence);
    use("padding", &VadNumbers::padding, Range{0, 1000000000, false}, &u2moe_vad_options::padding);
  }
};

/// Fields of the objects in bundle.json: the class of what is in them, after {} for a map, and their default.
constexpr const char* kDeclared = R"({
"Manifest": {"model": ["ModelConfig"], "features": ["FeatureConfig"], "text": ["TextConfig"], "decoding": ["DecodingConfig"], "producer": [""], "files": ["{}FileDigest"], "external": ["{}ExternalTensor", {}], "architecture": ["", {}], "quantization": ["", {}], "calibration": ["Calibration", null], "random_weights": ["", false], "version": ["", 4]},
"ModelConfig": {"streaming": [""], "decoder": [""], "feature_size": [""], "output_size": [""], "num_blocks": [""], "vocab_size": [""], "subsampling_rate": [""], "right_context": [""], "static_chunk_size": [""], "blank": [""], "sos": [""], "eos": [""], "caches": ["Cache", []], "chunk_multiple": ["", 1], "frame_reduction": ["", 1], "max_position": ["", 5000], "static": ["StaticForm", null]},
"Cache": {"name": [""], "num_blocks": [""], "shape": [""], "rate": ["", 1.0]},
"StaticForm": {"chunk_size": ["", 16], "num_left_chunks": ["", 4], "first_position": ["", 0], "rates": ["StaticRate", [{}]], "histories": ["StaticHistory", []], "frequencies": ["", []], "interleaved": ["", true]},
"StaticRate": {"step": ["", 1], "mask": ["", "mask"], "positions": ["", ""]},
"StaticHistory": {"cache": [""], "start": [""], "steps": [""]},
"FeatureConfig": {"sample_rate": ["", 16000], "num_mel_bins": ["", 80], "frame_length_ms": ["", 25.0], "frame_shift_ms": ["", 10.0], "window": ["", "povey"], "num_ceps": ["", 0], "low_hz": ["", 20.0], "high_hz": ["", 0.0]},
"TextConfig": {"tokenizer": ["", "char"], "unk": ["", null]},
"DecodingConfig": {"ctc_weight": ["", 0.3], "reverse_weight": ["", 0.3], "beam_size": ["", 10], "padding_s": ["", 0.0], "blank_penalty": ["", 0.0], "endpoint": ["EndpointConfig", {}], "hotwords": ["", []], "language_model": ["BundledLanguageModel", null]},
"EndpointConfig": {"rule1": ["EndpointRule", {"min_trailing_silence": 2.4}], "rule2": ["EndpointRule", {"must_contain_nonsilence": true, "min_trailing_silence": 1.2}], "rule3": ["EndpointRule", {"min_utterance_length": 20.0}], "pause": ["", 0.5], "turn": ["", null]},
"EndpointRule": {"must_contain_nonsilence": ["", false], "min_trailing_silence": ["", 0.0], "min_utterance_length": ["", 0.0]},
"BundledLanguageModel": {"weight": ["", 0.5], "word_bonus": ["", 0.5], "unknown_score": ["", -5.0], "rescoring_weight": ["", 1.0], "level": ["", null], "file": [""]},
"FileDigest": {"sha256": [""], "size": [""], "blocks": ["", []]},
"ExternalTensor": {"name": [""], "file": [""], "offset": [""], "length": [""], "type": [""], "shape": [""], "group": [""], "read_by": [""]},
"Calibration": {"scale": ["", 1.0], "bias": ["", 0.0]}
})";

}  // namespace u2moe::runtime
