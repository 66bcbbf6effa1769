// One source of audio: samples in, partial and final results out.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "endpoint.hpp"
#include "reception.hpp"
#include "result.hpp"

namespace u2moe {

/// A bundle and its sessions. Immutable: threads may share it.
struct Model {
  Model(const std::string& folder, int num_threads) : bundle(folder), graphs(bundle, num_threads) {}

  const Bundle bundle;
  const Graphs graphs;
};

struct StreamOptions {
  int chunk_size = 0;         ///< encoder frames of a chunk; 0: as in training, or 16
  int num_left_chunks = -1;   ///< chunks of the past that the encoder sees; -1: all
  int beam_size = 10;         ///< prefixes that the first pass keeps, and hypotheses that the second pass scores
  std::optional<double> padding_s = std::nullopt;  ///< silence around sources that are cut in a sound, 0 to 10 s; none: as in the bundle
  bool endpoint = true;       ///< whether utterances end by the rules; false: the input is one utterance
  EndpointRules rules = {EndpointRule{false, 2.4, 0}, EndpointRule{true, 1.2, 0}, EndpointRule{false, 0, 20}};  ///< Kaldi's
  std::shared_ptr<const ContextGraph> hotwords = nullptr;  ///< phrases to prefer; null: none. Streams may share them.

  /// @throws std::invalid_argument an option is out of range.
  void check() const {
    if (chunk_size < 0 || chunk_size > 10000) throw std::invalid_argument("chunk_size must be from 0 to 10000, got " + std::to_string(chunk_size));
    if (num_left_chunks < -1) throw std::invalid_argument("num_left_chunks must be at least -1, got " + std::to_string(num_left_chunks));
    if (beam_size < 1 || beam_size > 1000) throw std::invalid_argument("beam_size must be from 1 to 1000, got " + std::to_string(beam_size));
    if (padding_s && !(*padding_s >= 0 && *padding_s <= kLongestPaddingS)) throw std::invalid_argument("padding_s must be from 0 to 10 seconds");
    for (const std::optional<EndpointRule>& rule : rules) {
      if (rule && !rule->is_valid()) {
        throw std::invalid_argument("endpoint rules need silence or a length above 0 seconds (std::nullopt: no rule)");
      }
    }
  }
};

/// Not thread-safe; different streams of one recogniser may run in different threads. Movable; keeps the model alive. After an
/// error during recognition, including one thrown by the callback, audio is lost and only `reset` is allowed.
class Stream {
 public:
  using OnResult = std::function<void(const Result&)>;

  /// @param on_result called from within `accept_waveform` and `input_finished`, in the thread that calls them: with partial
  /// results, and with a final one for each utterance that has words. It may not feed, finish, reset or destroy the stream.
  /// @throws std::invalid_argument an option is out of range, or there is no `on_result`.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options, OnResult on_result)
      : model_(std::move(model)), options_((options.check(), options)), on_result_(std::move(on_result)),
        reception_(model_->graphs, m(), chunk_size(), padding_s()), search_(new_search()),
        endpointer_(options.rules, m().frame_s(), m().blank), caches_(model_->graphs.start()) {
    if (!on_result_) throw std::invalid_argument("on_result must be a function");
    if (options_.hotwords && !options_.hotwords->is_of(vocabulary())) {
      throw std::invalid_argument("hotwords are for the vocabulary of another bundle");
    }
  }
  Stream(const Stream&) = delete;  // searches share what they change
  Stream& operator=(const Stream&) = delete;
  Stream(Stream&&) = default;
  Stream& operator=(Stream&&) = default;

  /// Append samples of one channel, in [-1, 1], and recognise what is complete. Any split gives the same results.
  /// @param sample_rate in Hz, 1000 to 384000; the first one applies to the whole stream.
  /// @param samples are read until it returns: `on_result` may not change them.
  /// @throws AudioError a rate or samples that cannot be used; nothing is appended.
  /// @throws StreamError the input is finished, recognition has failed before, or `on_result` calls it.
  void accept_waveform(int sample_rate, const float* samples, std::size_t num) {
    check_usable();
    reception_.check(sample_rate, samples, num);
    guarded([&] {
      // Seconds one by one, so that an hour takes no more memory, and no more time for each window, than a second.
      const auto second = static_cast<std::size_t>(sample_rate);
      for (std::size_t begin = 0; begin < num; begin += second) {
        reception_.accept(samples + begin, std::min(second, num - begin));
        decode();
      }
    });
  }

  /// Finish the input: the last results come now.
  /// @throws StreamError the input is already finished, recognition has failed before, or `on_result` calls it.
  void input_finished() {
    check_usable();
    guarded([this] {
      reception_.finish();
      decode();
      conclude();
    });
  }

  /// Discard everything and begin a new source.
  /// @throws StreamError `on_result` calls it.
  void reset() {
    check_not_decoding();
    *this = Stream(model_, options_, on_result_);
  }

 private:
  struct Frames {
    Floats output, log_probs;
  };

  const Manifest& m() const { return model_->bundle.manifest; }
  const Vocabulary& vocabulary() const { return model_->bundle.vocabulary; }
  std::size_t vocab() const { return static_cast<std::size_t>(m().vocab_size); }
  std::size_t dim() const { return static_cast<std::size_t>(m().output_size); }
  int chunk_size() const { return options_.chunk_size ? options_.chunk_size : m().static_chunk_size ? m().static_chunk_size : 16; }
  double padding_s() const { return options_.padding_s.value_or(m().padding_s); }
  PrefixBeamSearch new_search() const { return {static_cast<std::size_t>(options_.beam_size), m().blank, options_.hotwords}; }

  void check_not_decoding() const {
    if (is_decoding_) throw StreamError("this stream is decoding: its callback may not feed, finish or reset it");
  }

  void check_usable() const {
    check_not_decoding();
    if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
    if (reception_.is_finished()) throw StreamError("the input of this stream is finished: reset it, or create another");
  }

  template <class Work>
  void guarded(Work work) {
    is_decoding_ = true;
    try {
      work();
    } catch (...) {
      has_failed_ = true;
      is_decoding_ = false;
      throw;
    }
    is_decoding_ = false;
  }

  void decode() {
    const std::int64_t required = options_.num_left_chunks < 0 ? -1 : std::int64_t{chunk_size()} * options_.num_left_chunks;
    while (reception_.has_window()) {
      Frames frames{model_->graphs.encode(reception_.take_window(), caches_, required), {}};
      frames.log_probs = model_->graphs.ctc(frames.output);
      advance(frames);
      while (endpoint_) conclude();
      const Hypothesis best = search_.best();
      if (!best.tokens.empty()) give({vocabulary().text(best.tokens), false, number_, best.tokens, seconds(best.times), {}, {}});
    }
  }

  // Give a result with times of the source, without the silence before it.
  void give(Result result) {
    const double lead = reception_.lead_s(), end = reception_.end_s();
    const auto move = [=](double& time) { time = rounded(std::min(std::max(time - lead, 0.0), end)); };
    if (padding_s() > 0) {
      std::for_each(result.times.begin(), result.times.end(), move);
      for (Word& word : result.words) {
        move(word.start);
        move(word.end);
      }
    }
    on_result_(result);
  }

  // Add encoder frames to the current utterance, up to its end.
  void advance(const Frames& frames) {
    std::size_t num = frames.output.size() / dim();
    if (options_.endpoint) endpoint_ = endpointer_.advance(frames.log_probs.data(), num, vocab());
    if (endpoint_) {
      num = endpoint_->num_frames;
      surplus_.output.assign(frames.output.begin() + static_cast<std::ptrdiff_t>(num * dim()), frames.output.end());
      surplus_.log_probs.assign(frames.log_probs.begin() + static_cast<std::ptrdiff_t>(num * vocab()), frames.log_probs.end());
    }
    num_frames_ += num;
    output_.insert(output_.end(), frames.output.begin(), frames.output.begin() + static_cast<std::ptrdiff_t>(num * dim()));
    search_.advance(frames.log_probs.data(), num, vocab());
  }

  // Give the current utterance its final result, and begin the next one where it ends.
  void conclude() {
    if (endpoint_ && endpoint_->trailing_silence * m().frame_s() < kShortestPauseS) cut();
    const Result result = final_result();
    if (!result.text.empty()) give(result);
    if (!endpoint_) return;
    const Frames surplus = std::exchange(surplus_, {});
    caches_.offset = static_cast<std::int64_t>(surplus.output.size() / dim());
    model_->graphs.keep_last(caches_, caches_.offset);
    begin_utterance(number_ + (result.text.empty() ? 0 : 1), start_ + num_frames_);
    advance(surplus);
  }

  // An utterance that ends within speech ends between two of its words instead, if there are two.
  void cut() {
    const Floats log_probs = model_->graphs.ctc(output_);
    const auto num = find_cut(vocabulary(), search_.best().tokens, log_probs, vocab(), m().blank);
    if (!num) return;
    surplus_.output.insert(surplus_.output.begin(), output_.begin() + static_cast<std::ptrdiff_t>(*num * dim()), output_.end());
    surplus_.log_probs.insert(surplus_.log_probs.begin(), log_probs.begin() + static_cast<std::ptrdiff_t>(*num * vocab()), log_probs.end());
    output_.resize(*num * dim());
    num_frames_ = *num;
    search_ = new_search();
    search_.advance(log_probs.data(), *num, vocab());
  }

  Result final_result() {
    search_.finish();
    const std::vector<Ranked> ranked = rescored(search_.hypotheses());
    const Ranked& best = ranked[0];
    const auto start = static_cast<std::int64_t>(start_), num = static_cast<std::int64_t>(num_frames_);
    Result result{vocabulary().text(best.hypothesis.tokens), true, number_, best.hypothesis.tokens, seconds(best.hypothesis.times),
                  words_of(m(), vocabulary(), best, start, num, pauses()), {}};
    std::set<std::string> seen;
    for (const Ranked& each : ranked) {
      const std::string text = vocabulary().text(each.hypothesis.tokens);
      if (result.nbest.size() == static_cast<std::size_t>(options_.beam_size)) break;  // hotwords may have added more
      if (seen.insert(text).second) result.nbest.push_back({text, each.hypothesis.tokens, each.score});
    }
    return result;
  }

  std::vector<Ranked> rescored(std::vector<Hypothesis> hypotheses) const {
    if (m().has_decoder && !output_.empty()) {
      std::vector<std::vector<int>> tokens;
      for (const Hypothesis& hypothesis : hypotheses) tokens.push_back(hypothesis.tokens);
      const TokenScores scores = model_->graphs.score(output_, tokens);
      return attention_rescoring(std::move(hypotheses), scores, m().ctc_weight, m().reverse_weight);
    }
    std::vector<Ranked> ranked;
    for (Hypothesis& hypothesis : hypotheses) {
      const double score = hypothesis.score;
      std::vector<double> probabilities = hypothesis.probabilities;
      ranked.push_back({std::move(hypothesis), score, std::move(probabilities)});
    }
    return ranked;
  }

  std::vector<double> seconds(const std::vector<int>& times) const {
    std::vector<double> found;
    for (int time : times) found.push_back(rounded((static_cast<double>(start_) + time) * m().frame_s()));
    return found;
  }

  // Pauses in the current utterance, in seconds from the first sample of the stream.
  std::vector<Seconds> pauses() const {
    const std::vector<float> levels = reception_.levels(num_frames_ * static_cast<std::size_t>(m().subsampling_rate));
    std::vector<Seconds> found = find_pauses(levels, m().frame_shift_ms / 1000);
    const double begin = static_cast<double>(start_) * m().frame_s();
    for (Seconds& pause : found) pause = {begin + pause.first, begin + pause.second};
    return found;
  }

  void begin_utterance(int number, std::size_t start) {
    reception_.forget(start);
    number_ = number;
    start_ = start;
    num_frames_ = 0;
    output_.clear();
    endpoint_.reset();
    endpointer_.reset();
    search_ = new_search();
  }

  std::shared_ptr<const Model> model_;
  StreamOptions options_;
  OnResult on_result_;
  bool has_failed_ = false, is_decoding_ = false;

  Reception reception_;
  PrefixBeamSearch search_;
  Endpointer endpointer_;
  Caches caches_;
  int number_ = 0;                          // of the current utterance
  std::size_t start_ = 0, num_frames_ = 0;  // its encoder frames
  Floats output_;
  std::optional<Endpoint> endpoint_;
  Frames surplus_;  // frames after its end, with which the next one begins
};

}  // namespace u2moe
