// The recognition of one source of audio, but for running graphs: whoever has them asks which is next, and gives its output.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention_search.hpp"
#include "ctc.hpp"
#include "endpoint.hpp"
#include "manifest.hpp"
#include "reception.hpp"
#include "result.hpp"
#include "u2moe.h"

namespace u2moe::runtime {

enum class Search { kDefault, kRescoring, kPrefixBeam, kGreedy, kAttention };

/// @throws InvalidArgument there is no search of this name.
Search search_of(const std::string& name);

/// See u2moe_stream_options.
struct StreamOptions {
  static constexpr int kFullContext = U2MOE_FULL_CONTEXT;

  int chunk_size = 0;
  int num_left_chunks = -1;
  Search search = Search::kDefault;
  int beam_size = 0;                                            ///< 0: as in the bundle
  std::optional<double> ctc_weight, reverse_weight, padding_s;  ///< none: as in the bundle
  double length_penalty = 0;
  bool endpoint = true;
  EndpointRules rules = kDefaultRules;
  double pause = kDefaultPauseS;
  std::shared_ptr<const ContextGraph> hotwords = nullptr;
  std::shared_ptr<const Fusion> language_model = nullptr;
  bool written = false;

  bool has_beam() const { return search != Search::kGreedy && search != Search::kAttention; }

  /// With definite values instead of those of the bundle.
  /// @throws InvalidArgument an option is out of range, or the bundle does not support it.
  StreamOptions for_bundle(const Manifest& m, const Vocabulary& vocabulary) const;
};

/// Token sequences [number, longest] in one array, the shorter ones followed by eos, and their lengths.
struct Sequences {
  Sequences(const std::vector<std::vector<int>>& sequences, int eos);

  std::size_t longest = 1;
  std::vector<std::int64_t> tokens, lengths;
};

/// A graph to run before recognition goes on.
struct Request {
  enum class Graph { kFeatures = 1, kEncoder, kCtc, kDecoder, kVad };

  Graph graph;
  const Floats* input;                   ///< samples, window of features, or encoder output
  const Sequences* sequences = nullptr;  ///< for the decoder
  // For the encoder: whether caches are those of the beginning; of caches that grow, only so many frames, -1: all; and frames of
  // left context that it has to keep, -1: all.
  bool begins = false;
  std::int64_t kept = -1, required = -1;
};

/// Recognises all samples that it is given; as `Source`, which says what its functions do.
class Recognition {
 public:
  Recognition(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options);

  const StreamOptions& options() const { return options_; }
  bool is_finished() const { return reception_.is_finished(); }
  void check(int sample_rate, const float* samples, std::size_t num) { reception_.check(sample_rate, samples, num); }
  void accept(const float* samples, std::size_t num) { reception_.accept(samples, num); }
  void finish() { reception_.finish(); }
  std::optional<Request> next();
  void give(Floats output);
  void give(const TokenScores& scores);
  std::vector<Result> take_segments() { return std::exchange(segments_, {}); }
  Result result() const;

 private:
  struct Frames {
    Floats output, log_probs;
  };

  const Manifest& m() const { return *manifest_; }
  std::size_t vocab() const { return static_cast<std::size_t>(m().vocab_size); }
  std::size_t dim() const { return static_cast<std::size_t>(m().output_size); }
  bool has_full_context() const { return options_.chunk_size == StreamOptions::kFullContext; }
  std::unique_ptr<CtcSearch> new_search() const;
  int reception_chunk_size() const;

  bool is_searched() const;
  bool begin_step();
  void begin_window();
  void begin_encoder();
  void begin_end();
  void begin_second_pass();
  void ask_decoder(const std::vector<std::vector<int>>& sequences);
  void search_alone();
  void conclude_alone(const Floats& log_probs);
  std::vector<Ranked> unranked() const;
  void advance(const Frames& frames);
  void cut(const Floats& log_probs);
  void conclude(std::vector<Ranked> ranked);
  void repeat();
  void begin_utterance(int number, std::size_t start);

  Result final_result(const std::vector<Ranked>& ranked) const;
  Result presented(Result result) const;
  std::vector<double> seconds(const std::vector<int>& times) const;
  std::vector<Seconds> pauses() const;

  const Manifest* manifest_;
  const Vocabulary* vocabulary_;
  StreamOptions options_;

  Reception reception_;
  std::unique_ptr<CtcSearch> search_;
  Endpointer endpointer_;
  PauseRule pause_rule_;
  std::optional<Request> request_;
  Floats samples_, window_;                 // of the request
  std::vector<Hypothesis> hypotheses_;
  std::optional<Sequences> sequences_;      // of the request
  std::optional<AttentionSearch> alone_;    // of the decoder, at the end of an utterance
  bool is_cutting_ = false;                 // log-probabilities that are asked for are those of the whole utterance
  bool is_left_open_ = false;               // the utterance goes on, but fills most of a window
  bool is_at_start_ = true;                 // the encoder was not asked yet
  std::int64_t num_kept_ = -1;              // of the next request of the encoder
  int number_ = 0;                          // of the current utterance
  std::size_t start_ = 0, num_frames_ = 0;  // its encoder frames
  Floats output_;
  std::optional<Endpoint> endpoint_;
  Frames frames_;                 // of the last window
  Frames surplus_;                // frames after its end, with which the next one begins
  std::optional<Result> last_;    // the result of the last utterance, once it is concluded
  std::vector<Result> segments_;
};

}  // namespace u2moe::runtime
