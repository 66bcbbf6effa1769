// One source of audio: samples in, partial and final results out.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "ctc.hpp"
#include "endpoint.hpp"
#include "graphs.hpp"
#include "reception.hpp"
#include "result.hpp"

namespace u2moe::runtime {

/// A bundle and its sessions. Immutable: threads may share it.
struct Model {
  Model(Files files, Settings chosen) : settings(std::move(chosen)), bundle(std::move(files)), graphs(bundle, settings) {}

  const Settings settings;
  const Bundle bundle;
  const Graphs graphs;
};

enum class Search { kDefault, kRescoring, kPrefixBeam, kGreedy };

/// See u2moe_stream_options.
struct StreamOptions {
  static constexpr int kFullContext = U2MOE_FULL_CONTEXT;

  int chunk_size = 0;
  int num_left_chunks = -1;
  Search search = Search::kDefault;
  int beam_size = 10;
  std::optional<double> ctc_weight, reverse_weight, padding_s;  ///< none: as in the bundle
  bool endpoint = true;
  EndpointRules rules = {EndpointRule{false, 2.4, 0}, EndpointRule{true, 1.2, 0}, EndpointRule{false, 0, 20}};  ///< Kaldi's
  double pause = 0.5;
  std::shared_ptr<const ContextGraph> hotwords = nullptr;
  std::shared_ptr<const Fusion> language_model = nullptr;

  /// With definite values instead of those of the bundle.
  /// @throws InvalidArgument an option is out of range, or the bundle does not support it.
  StreamOptions for_bundle(const Bundle& bundle) const;
};

/// Not thread-safe; different streams of one model may run in different threads. Keeps the model alive. After an error during
/// recognition audio is lost, and another stream must take its place.
class Stream {
 public:
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options);

  /// Append samples of one channel, in [-1, 1], and recognise what is complete. Any split gives the same results.
  /// @throws AudioError a rate or samples that cannot be used; nothing is appended.
  /// @throws StreamError the input is finished, or recognition has failed before.
  void accept_waveform(int sample_rate, const float* samples, std::size_t num);

  /// Finish the input, and recognise the rest.
  void input_finished();

  /// Final results of utterances that have words, each once.
  std::optional<Result> take_segment();
  bool has_segments() const { return !segments_.empty(); }

  /// The result so far of the current utterance; final and perhaps empty after the end of the input.
  Result result() const;

  /// Discard everything and begin a new source.
  void reset() { *this = Stream(model_, options_); }

 private:
  struct Frames {
    Floats output, log_probs;
  };

  const Manifest& m() const { return model_->bundle.manifest(); }
  const Vocabulary& vocabulary() const { return model_->bundle.vocabulary(); }
  std::size_t vocab() const { return static_cast<std::size_t>(m().vocab_size); }
  std::size_t dim() const { return static_cast<std::size_t>(m().output_size); }
  bool has_full_context() const { return options_.chunk_size == StreamOptions::kFullContext; }
  CtcSearch new_search() const;
  int reception_chunk_size() const;

  void check_usable() const;
  template <class Work>
  void guarded(Work work);

  void decode();
  void settle();
  bool is_searched() const;
  Frames encode_window();
  void advance(const Frames& frames);
  void cut();
  void conclude();
  void begin_utterance(int number, std::size_t start);

  Result final_result();
  std::vector<Ranked> rescored(std::vector<Hypothesis> hypotheses) const;
  Result presented(Result result) const;
  std::vector<double> seconds(const std::vector<int>& times) const;
  std::vector<Seconds> pauses() const;

  std::shared_ptr<const Model> model_;
  StreamOptions options_;
  bool has_failed_ = false;

  Reception reception_;
  CtcSearch search_;
  Endpointer endpointer_;
  PauseRule pause_rule_;
  Caches caches_;
  int number_ = 0;                          // of the current utterance
  std::size_t start_ = 0, num_frames_ = 0;  // its encoder frames
  Floats output_;
  std::optional<Endpoint> endpoint_;
  Frames surplus_;                // frames after its end, with which the next one begins
  std::optional<Result> last_;    // the result of the last utterance, once it is concluded
  std::deque<Result> segments_;
};

}  // namespace u2moe::runtime
