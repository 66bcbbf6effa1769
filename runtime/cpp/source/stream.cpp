#include "stream.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>

#include "alignment.hpp"
#include "errors.hpp"

namespace u2moe::runtime {
namespace {

constexpr double kLongestWindowS = 30;  // encoded at once with full context, if utterances end by endpoints

void append(Floats& all, const Floats& more, std::size_t begin, std::size_t end) {
  all.insert(all.end(), more.begin() + static_cast<std::ptrdiff_t>(begin), more.begin() + static_cast<std::ptrdiff_t>(end));
}

}  // namespace

StreamOptions StreamOptions::for_bundle(const Bundle& bundle) const {
  const Manifest& m = bundle.manifest();
  check_range("chunk_size", chunk_size, kFullContext, 10000);
  check_range("num_left_chunks", num_left_chunks, -1, 1e9);
  check_range("beam_size", beam_size, 1, 1000);
  if (padding_s) check_range("padding_s", *padding_s, 0, kLongestPaddingS);
  if (ctc_weight) check_range("ctc_weight", *ctc_weight, 0, 1e9);
  if (reverse_weight) check_range("reverse_weight", *reverse_weight, 0, 1);
  if (pause != 0) check_range("pause", pause, kShortestPauseS, 1e9);
  for (const std::optional<EndpointRule>& rule : rules) {
    if (rule && !rule->is_valid()) throw InvalidArgument("endpoint rules need silence or a length above 0 seconds");
  }
  if (hotwords && !hotwords->is_of(bundle.vocabulary())) throw InvalidArgument("hotwords are for the vocabulary of another bundle");
  if (language_model && !language_model->is_of(bundle.vocabulary())) {
    throw InvalidArgument("the language model was opened for the vocabulary of another bundle");
  }
  if (search == Search::kGreedy && (hotwords || language_model)) {
    throw InvalidArgument("hotwords and a language model need a prefix beam search or rescoring, search is 'ctc_greedy'");
  }
  if (chunk_size == kFullContext && !endpoint) {
    throw InvalidArgument("full context needs endpoint rules: without them its memory grows with the square of the recording");
  }
  StreamOptions definite = *this;
  const int trained = m.static_chunk_size;
  if (chunk_size == 0 || (chunk_size == kFullContext && trained && m.streaming)) definite.chunk_size = trained ? trained : 16;
  if (definite.chunk_size != kFullContext && !m.streaming) {
    throw StreamError("this bundle's encoder cannot stream: it was trained for full context (chunk_size U2MOE_FULL_CONTEXT)");
  }
  if (definite.chunk_size != kFullContext && definite.chunk_size % m.chunk_multiple) {
    throw StreamError("chunk_size must be a multiple of " + std::to_string(m.chunk_multiple) + " for this encoder, got " +
                      std::to_string(definite.chunk_size));
  }
  if (search == Search::kRescoring && !m.has_decoder) {
    throw StreamError("search 'attention_rescoring' needs a decoder, and this bundle has none (CTC only)");
  }
  if (search == Search::kDefault) definite.search = m.has_decoder ? Search::kRescoring : Search::kPrefixBeam;
  definite.ctc_weight = ctc_weight.value_or(m.ctc_weight);
  definite.reverse_weight = reverse_weight.value_or(m.reverse_weight);
  definite.padding_s = padding_s.value_or(m.padding_s);
  return definite;
}

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options)
    : model_(std::move(model)), options_(options.for_bundle(model_->bundle)),
      reception_(model_->graphs, m(), reception_chunk_size(), has_full_context(), *options_.padding_s), search_(new_search()),
      endpointer_(options_.rules, m().frame_s(), m().blank),
      pause_rule_(options_.endpoint ? options_.pause : 0, m().frame_s(), m().frame_shift_ms / 1000), caches_(model_->graphs.start()) {}

CtcSearch Stream::new_search() const {
  if (options_.search == Search::kGreedy) return CtcSearch(GreedySearch(m().blank));
  return CtcSearch(PrefixBeamSearch(static_cast<std::size_t>(options_.beam_size), m().blank, options_.hotwords, options_.language_model));
}

int Stream::reception_chunk_size() const {
  if (!has_full_context()) return options_.chunk_size;
  return static_cast<int>(std::nearbyint((kLongestWindowS + 2 * *options_.padding_s) / m().frame_s()));
}

void Stream::check_usable() const {
  if (has_failed_) throw StreamError("recognition of this stream has failed, and audio was lost: reset it, or create another");
  if (reception_.is_finished()) throw StreamError("the input of this stream is finished: reset it, or create another");
}

template <class Work>
void Stream::guarded(Work work) {
  has_failed_ = true;
  work();
  has_failed_ = false;
}

void Stream::accept_waveform(int sample_rate, const float* samples, std::size_t num) {
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

void Stream::input_finished() {
  check_usable();
  guarded([this] {
    reception_.finish();
    decode();
  });
}

std::optional<Result> Stream::take_segment() {
  if (segments_.empty()) return std::nullopt;
  std::optional<Result> first = std::move(segments_.front());
  segments_.pop_front();
  return first;
}

Result Stream::result() const {
  if (last_) return *last_;
  Result result;
  result.segment = number_;
  const std::vector<Hypothesis> best = search_.hypotheses(1);
  if (best.empty()) return result;
  result.text = vocabulary().text(best[0].tokens);
  result.tokens = best[0].tokens;
  result.times = seconds(best[0].times);
  return presented(std::move(result));
}

// All work that is ready.
void Stream::decode() {
  for (;;) {
    settle();
    if (!reception_.has_window()) return;
    advance(encode_window());
  }
}

// Conclude the current utterance if it has ended, and decide about one left open with full context.
void Stream::settle() {
  while (is_searched()) {
    if (endpoint_ && static_cast<double>(endpoint_->trailing_silence) * m().frame_s() < kShortestPauseS) cut();
    conclude();
  }
  if (!has_full_context() || num_frames_ == 0 || last_) return;
  // It may continue, and is encoded again with the next audio unless it fills most of the window.
  if (2 * num_frames_ > reception_.num_window_frames()) {
    cut();
    conclude();
  }
  reception_.repeat_window(num_frames_);
  begin_utterance(number_, start_);
}

// Whether the first pass of the current utterance is complete, and its final result missing.
bool Stream::is_searched() const { return endpoint_ || (reception_.is_exhausted() && !last_); }

Stream::Frames Stream::encode_window() {
  reception_.take_window();
  Frames frames;
  if (has_full_context()) {
    const auto end = pause_rule_.end_of_window(reception_.window_levels(), start_, reception_.window_is_full(), reception_.is_exhausted());
    if (end) reception_.shorten_window(*end);
    Caches caches = model_->graphs.start();
    frames.output = model_->graphs.encode(reception_.window(), caches, 0);
  } else {
    const std::int64_t required = options_.num_left_chunks < 0 ? -1 : std::int64_t{options_.chunk_size} * options_.num_left_chunks;
    frames.output = model_->graphs.encode(reception_.window(), caches_, required);
  }
  frames.log_probs = model_->graphs.ctc(frames.output);
  return frames;
}

// Add encoder frames to the current utterance, up to its end.
void Stream::advance(const Frames& frames) {
  const std::size_t all = frames.output.size() / dim();
  std::size_t num = all;
  if (options_.endpoint) endpoint_ = endpointer_.advance(frames.log_probs.data(), all, vocab());
  if (endpoint_) {
    num = endpoint_->num_frames;
    surplus_ = {};
    append(surplus_.output, frames.output, num * dim(), all * dim());
    append(surplus_.log_probs, frames.log_probs, num * vocab(), all * vocab());
  }
  num_frames_ += num;
  append(output_, frames.output, 0, num * dim());
  search_.advance(frames.log_probs.data(), num, vocab());
  if (options_.endpoint && !endpoint_) endpoint_ = pause_rule_.endpoint(start_ + num_frames_, endpointer_.trailing_silence());
}

// An utterance that ends within speech ends between two of its words instead, if there are two.
void Stream::cut() {
  const Floats log_probs = model_->graphs.ctc(output_);
  const auto num = find_cut(vocabulary(), search_.hypotheses(1)[0].tokens, log_probs, vocab(), m().blank);
  if (!num) return;
  Frames rest;
  append(rest.output, output_, *num * dim(), output_.size());
  append(rest.log_probs, log_probs, *num * vocab(), log_probs.size());
  append(rest.output, surplus_.output, 0, surplus_.output.size());
  append(rest.log_probs, surplus_.log_probs, 0, surplus_.log_probs.size());
  surplus_ = std::move(rest);
  output_.resize(*num * dim());
  num_frames_ = *num;
  search_ = new_search();
  search_.advance(log_probs.data(), *num, vocab());
}

// Give the current utterance its final result, and begin the next one where it ends.
void Stream::conclude() {
  const bool is_last = !endpoint_ && reception_.is_exhausted();
  Result result = presented(final_result());
  const int number = number_ + (result.text.empty() ? 0 : 1);
  if (!result.text.empty()) segments_.push_back(result);
  if (is_last) {
    last_ = std::move(result);
    output_ = {};
    return;
  }
  const Frames surplus = std::exchange(surplus_, {});
  if (!has_full_context()) {
    caches_.offset = static_cast<std::int64_t>(surplus.output.size() / dim());
    model_->graphs.keep_last(caches_, caches_.offset);
  }
  begin_utterance(number, start_ + num_frames_);
  advance(surplus);
}

void Stream::begin_utterance(int number, std::size_t start) {
  reception_.forget(start);
  number_ = number;
  start_ = start;
  num_frames_ = 0;
  output_.clear();
  endpoint_.reset();
  endpointer_.reset();
  search_ = new_search();
}

Result Stream::final_result() {
  search_.finish();
  const std::vector<Ranked> ranked = rescored(search_.hypotheses());
  const Ranked& best = ranked[0];
  const auto start = static_cast<std::int64_t>(start_), num = static_cast<std::int64_t>(num_frames_);
  Result result;
  result.is_final = true;
  result.segment = number_;
  result.tokens = best.hypothesis.tokens;
  result.times = seconds(best.hypothesis.times);
  result.words = words_of(m(), vocabulary(), best, start, num, pauses());
  if (!result.words.empty()) {
    result.start = result.words.front().start;
    result.end = result.words.back().end;
    for (const Word& word : result.words) result.confidence += word.confidence / static_cast<double>(result.words.size());
  }
  std::set<std::string> seen;
  for (const Ranked& each : ranked) {
    const std::string text = vocabulary().text(each.hypothesis.tokens);
    if (result.nbest.size() == static_cast<std::size_t>(options_.beam_size)) break;  // hotwords may have added more
    if (!seen.insert(text).second) continue;
    result.nbest.push_back({text, each.hypothesis.tokens, each.score, each.hypothesis.score, each.attention_score, each.hypothesis.language_score});
  }
  result.text = result.nbest[0].text;
  return result;
}

std::vector<Ranked> Stream::rescored(std::vector<Hypothesis> hypotheses) const {
  if (options_.search == Search::kRescoring && !output_.empty()) {
    std::vector<std::vector<int>> tokens;
    for (const Hypothesis& hypothesis : hypotheses) tokens.push_back(hypothesis.tokens);
    const double language_weight = options_.language_model ? options_.language_model->rescoring_weight() : 1;
    return attention_rescoring(std::move(hypotheses), model_->graphs.score(output_, tokens), *options_.ctc_weight, *options_.reverse_weight,
                               language_weight);
  }
  std::vector<Ranked> ranked;
  for (Hypothesis& hypothesis : hypotheses) ranked.push_back({hypothesis, hypothesis.score, 0, hypothesis.probabilities});
  return ranked;
}

// A result with times of the source, without the silence before it.
Result Stream::presented(Result result) const {
  if (*options_.padding_s <= 0) return result;
  const double lead = reception_.lead_s(), end = reception_.end_s();
  const auto move = [=](double& time) { time = rounded(std::min(std::max(time - lead, 0.0), end)); };
  std::for_each(result.times.begin(), result.times.end(), move);
  for (Word& word : result.words) {
    move(word.start);
    move(word.end);
  }
  if (!result.words.empty()) {
    move(result.start);
    move(result.end);
  }
  return result;
}

std::vector<double> Stream::seconds(const std::vector<int>& times) const {
  std::vector<double> found;
  for (int time : times) found.push_back(rounded((static_cast<double>(start_) + time) * m().frame_s()));
  return found;
}

// Pauses in the current utterance, in seconds from the first sample of the stream.
std::vector<Seconds> Stream::pauses() const {
  const std::vector<float> levels = reception_.levels(num_frames_ * static_cast<std::size_t>(m().subsampling_rate));
  std::vector<Seconds> found = find_pauses(levels, m().frame_shift_ms / 1000);
  const double begin = static_cast<double>(start_) * m().frame_s();
  for (Seconds& pause : found) pause = {begin + pause.first, begin + pause.second};
  return found;
}

}  // namespace u2moe::runtime
