// One source of audio: samples in, partial and final results out.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "beam_search.hpp"
#include "endpoint.hpp"
#include "graphs.hpp"
#include "result.hpp"

namespace u2moe {

struct StreamOptions {
  int chunk_size = 0;        // encoder frames; 0: as in training, or 16
  int num_left_chunks = -1;  // -1: all
  int beam_size = 10;
  bool endpoint = true;
};

class Stream {
 public:
  using OnResult = std::function<void(const Result&)>;

  // Results arrive in `on_result`, from within `accept` and `finish`: partial ones, and a final one for each utterance.
  Stream(Graphs& graphs, const Bundle& bundle, const StreamOptions& options, OnResult on_result)
      : graphs_(graphs), m_(bundle.manifest), vocabulary_(bundle.vocabulary), options_(options), on_result_(std::move(on_result)),
        search_(1, 0), endpointer_(m_.frame_s(), m_.blank), caches_(graphs.start()) {
    const int chunk_size = options.chunk_size ? options.chunk_size : m_.static_chunk_size ? m_.static_chunk_size : 16;
    stride_ = static_cast<std::size_t>(chunk_size) * static_cast<std::size_t>(m_.subsampling_rate);
    shortest_ = static_cast<std::size_t>(m_.right_context) + 1;
    length_ = stride_ - static_cast<std::size_t>(m_.subsampling_rate) + shortest_;
    required_ = options.num_left_chunks < 0 ? -1 : std::int64_t{chunk_size} * options.num_left_chunks;
    begin_utterance(0, 0);
  }

  // Append samples of one channel at the model's rate, in [-1, 1]; any split gives the same results.
  void accept(const float* samples, std::size_t num) {
    samples_.insert(samples_.end(), samples, samples + num);
    decode();
  }

  // Finish the input: the last results come now.
  void finish() {
    finished_ = true;
    decode();
    conclude();
  }

 private:
  struct Frames {
    Floats output, log_probs;
  };

  std::size_t num_feature_frames() const {
    const std::size_t num = first_sample_ + samples_.size();
    const auto frame = static_cast<std::size_t>(m_.frame_len()), shift = static_cast<std::size_t>(m_.shift_len());
    return num < frame ? 0 : 1 + (num - frame) / shift;
  }

  void decode() {
    while (num_feature_frames() >= num_taken_ * stride_ + (finished_ ? shortest_ : length_)) {
      const Floats window = take_window();
      Frames frames{graphs_.encode(window, caches_, required_), {}};
      frames.log_probs = graphs_.ctc(frames.output);
      advance(std::move(frames));
      while (endpoint_) conclude();
      if (!search_.hypotheses(1)[0].tokens.empty()) on_result_(partial());
    }
  }

  // The next window [frames, mel]. Features are computed for the frames that a window adds, so that how the samples arrived
  // makes no difference, not even in the last bit.
  Floats take_window() {
    const auto bins = static_cast<std::size_t>(m_.feature_size), shift = static_cast<std::size_t>(m_.shift_len());
    const std::size_t begin = num_taken_ * stride_, end = std::min(begin + length_, num_feature_frames());
    if (end > num_computed_) {
      const auto first = samples_.begin() + static_cast<std::ptrdiff_t>(num_computed_ * shift - first_sample_);
      const std::size_t num = (end - 1 - num_computed_) * shift + static_cast<std::size_t>(m_.frame_len());
      const Floats added = graphs_.features(Floats(first, first + static_cast<std::ptrdiff_t>(num)));
      features_.insert(features_.end(), added.begin(), added.end());
      const std::vector<float> levels = loudness(added, bins);
      levels_.insert(levels_.end(), levels.begin(), levels.end());
      num_computed_ = end;
      const std::size_t used = std::min(end * shift - first_sample_, samples_.size());
      samples_.erase(samples_.begin(), samples_.begin() + static_cast<std::ptrdiff_t>(used));
      first_sample_ += used;
    }
    const auto place = [&](std::size_t frame) { return features_.begin() + static_cast<std::ptrdiff_t>((frame - first_frame_) * bins); };
    const Floats window(place(begin), place(end));
    const std::size_t next = std::min(begin + stride_, num_computed_);
    features_.erase(features_.begin(), place(next));
    first_frame_ = next;
    ++num_taken_;
    return window;
  }

  // Add encoder frames to the current utterance, up to its end.
  void advance(Frames frames) {
    const auto vocab = static_cast<std::size_t>(m_.vocab_size), dim = static_cast<std::size_t>(m_.output_size);
    std::size_t num = frames.output.size() / dim;
    if (options_.endpoint) endpoint_ = endpointer_.advance(frames.log_probs.data(), num, vocab);
    if (endpoint_) {
      num = endpoint_->num_frames;
      surplus_.output.assign(frames.output.begin() + static_cast<std::ptrdiff_t>(num * dim), frames.output.end());
      surplus_.log_probs.assign(frames.log_probs.begin() + static_cast<std::ptrdiff_t>(num * vocab), frames.log_probs.end());
    }
    num_frames_ += num;
    output_.insert(output_.end(), frames.output.begin(), frames.output.begin() + static_cast<std::ptrdiff_t>(num * dim));
    search_.advance(frames.log_probs.data(), num, vocab);
  }

  // Give the current utterance its final result, and begin the next one where it ends.
  void conclude() {
    const bool within_speech = endpoint_ && endpoint_->trailing_silence * m_.frame_s() < kShortestPauseS;
    if (within_speech) cut();
    const Result result = final_result();
    if (!result.text.empty()) on_result_(result);
    if (!endpoint_) return;
    const Frames surplus = std::move(surplus_);
    surplus_ = {};
    caches_.offset = static_cast<std::int64_t>(surplus.output.size()) / m_.output_size;
    graphs_.keep_last(caches_, caches_.offset);
    begin_utterance(number_ + (result.text.empty() ? 0 : 1), start_ + num_frames_);
    advance(surplus);
  }

  // An utterance that ends within speech ends between two of its words instead, if there are two.
  void cut() {
    const auto vocab = static_cast<std::size_t>(m_.vocab_size), dim = static_cast<std::size_t>(m_.output_size);
    const Floats log_probs = graphs_.ctc(output_);
    const auto num = find_cut(vocabulary_, search_.hypotheses(1)[0].tokens, log_probs, vocab, m_.blank);
    if (!num) return;
    surplus_.output.insert(surplus_.output.begin(), output_.begin() + static_cast<std::ptrdiff_t>(*num * dim), output_.end());
    surplus_.log_probs.insert(surplus_.log_probs.begin(), log_probs.begin() + static_cast<std::ptrdiff_t>(*num * vocab), log_probs.end());
    output_.resize(*num * dim);
    num_frames_ = *num;
    search_ = PrefixBeamSearch(static_cast<std::size_t>(options_.beam_size), m_.blank);
    search_.advance(log_probs.data(), *num, vocab);
  }

  Result partial() const {
    const Hypothesis best = search_.hypotheses(1)[0];
    return {vocabulary_.text(best.tokens), false, number_, best.tokens, seconds(best.times), {}, {}};
  }

  Result final_result() {
    std::vector<Hypothesis> hypotheses = search_.hypotheses(static_cast<std::size_t>(options_.beam_size));
    std::vector<Ranked> ranked;
    if (graphs_.has_decoder() && !output_.empty()) {
      std::vector<std::vector<int>> tokens;
      for (const Hypothesis& hypothesis : hypotheses) tokens.push_back(hypothesis.tokens);
      ranked = attention_rescoring(std::move(hypotheses), graphs_.score(output_, tokens), m_.ctc_weight, m_.reverse_weight);
    } else {
      for (Hypothesis& hypothesis : hypotheses) {
        const double score = hypothesis.score;
        std::vector<double> probabilities = hypothesis.probabilities;
        ranked.push_back({std::move(hypothesis), score, std::move(probabilities)});
      }
    }
    const Ranked& best = ranked[0];
    const auto start = static_cast<std::int64_t>(start_), num = static_cast<std::int64_t>(num_frames_);
    Result result{vocabulary_.text(best.hypothesis.tokens), true, number_, best.hypothesis.tokens, seconds(best.hypothesis.times),
                  words_of(m_, vocabulary_, best, start, num, pauses()), {}};
    std::set<std::string> seen;
    for (const Ranked& each : ranked) {
      const std::string text = vocabulary_.text(each.hypothesis.tokens);
      if (seen.insert(text).second) result.nbest.push_back({text, each.hypothesis.tokens, each.score});
    }
    return result;
  }

  std::vector<double> seconds(const std::vector<int>& times) const {
    std::vector<double> found;
    for (int time : times) found.push_back(rounded((static_cast<double>(start_) + time) * m_.frame_s()));
    return found;
  }

  // Pauses in the current utterance, in seconds from the first sample of the stream.
  std::vector<Seconds> pauses() const {
    const std::size_t num = std::min(levels_.size(), num_frames_ * static_cast<std::size_t>(m_.subsampling_rate));
    const std::vector<float> levels(levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(num));
    std::vector<Seconds> found = find_pauses(levels, m_.frame_shift_ms / 1000);
    const double begin = static_cast<double>(start_) * m_.frame_s();
    for (Seconds& pause : found) pause = {begin + pause.first, begin + pause.second};
    return found;
  }

  void begin_utterance(int number, std::size_t start) {
    const std::size_t first = start * static_cast<std::size_t>(m_.subsampling_rate);
    levels_.erase(levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(std::min(first - levels_start_, levels_.size())));
    levels_start_ = first;
    number_ = number;
    start_ = start;
    num_frames_ = 0;
    output_.clear();
    endpoint_.reset();
    endpointer_.reset();
    search_ = PrefixBeamSearch(static_cast<std::size_t>(options_.beam_size), m_.blank);
  }

  Graphs& graphs_;
  const Manifest& m_;
  const Vocabulary& vocabulary_;
  StreamOptions options_;
  OnResult on_result_;
  std::size_t stride_, shortest_, length_;  // feature frames
  std::int64_t required_;

  Floats samples_, features_;
  std::size_t first_sample_ = 0, first_frame_ = 0, num_computed_ = 0, num_taken_ = 0;
  bool finished_ = false;
  std::vector<float> levels_;  // loudness of feature frames from levels_start_ on
  std::size_t levels_start_ = 0;

  PrefixBeamSearch search_;
  Endpointer endpointer_;
  Caches caches_;
  int number_ = 0;                         // of the current utterance
  std::size_t start_ = 0, num_frames_ = 0;  // its encoder frames
  Floats output_;
  std::optional<Endpoint> endpoint_;
  Frames surplus_;  // frames after its end, with which the next one begins
};

}  // namespace u2moe
