// One source of audio: with a voice activity detector each stretch of speech is recognised as a source of its own.
#pragma once

#include <deque>
#include <optional>

#include "recognition.hpp"
#include "resampler.hpp"
#include "speech.hpp"

namespace u2moe::runtime {

/// Whoever has the graphs asks which is next, and gives its output. The manifest and the vocabulary must outlive it.
class Source {
 public:
  /// @param vad none: all samples are recognised.
  /// @throws InvalidArgument, StreamError an option is out of range, or the bundle does not support it.
  Source(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options, const std::optional<VadOptions>& vad);

  const StreamOptions& options() const { return recognition_.options(); }  ///< with definite values

  /// Checks samples of one channel before any is appended.
  /// @throws AudioError a rate or samples that cannot be used.
  void check(int sample_rate, const float* samples, std::size_t num);

  /// Appends checked samples, at most some seconds. Any split gives the same results.
  void accept(const float* samples, std::size_t num);

  /// Finish the input.
  void finish();

  /// The graph to run next; none: more samples are needed, or the end of the input.
  std::optional<Request> next();

  /// The output of the graph of `next`: features [frames, mel], encoder output [time, dim], log-probabilities [time, vocab], or
  /// the probability of speech.
  void give(Floats output);
  void give(const TokenScores& scores) { recognition_.give(scores); }

  /// Final results of utterances that have words, each once.
  std::optional<Result> take_segment();
  bool has_segments() const { return !segments_.empty(); }

  /// The result so far of the current utterance; final and perhaps empty after the end of the input.
  Result result() const { return presented(recognition_.result()); }

 private:
  void recognize(const Speech& speech);
  Result presented(Result result) const;

  const Manifest* manifest_;
  const Vocabulary* vocabulary_;
  Recognition recognition_;  // of all, or of the current stretch of speech
  std::optional<Resampler> resampler_;  // before the finder
  std::optional<SpeechFinder> finder_;
  Floats window_;                       // whose probability is asked for; empty: none
  bool is_finished_ = false;
  double begin_s_ = 0;            // of the current stretch of speech
  int first_ = 0, number_ = 0;    // of its segments, and of the next segment
  std::deque<Result> segments_;
};

}  // namespace u2moe::runtime
