// Recognises one audio source. The caller runs the graphs: it asks for the next graph, runs it, and hands back its output.
#pragma once

#include "attention_search.hpp"
#include "feature_extractor.hpp"
#include "result.hpp"

namespace u2moe::runtime {

/// @throws InvalidArgument if the name is unknown.
inline Search search_of(const std::string& name) {
  for (const SearchName& each : kSearches) {
    if (name == each.name) return each.search;
  }
  const std::string names = joined(kSearches, ", ", [](const SearchName& each) { return each.name; });
  fail<InvalidArgument>("search must be one of " + names + ", got '" + name.substr(0, 80) + "'");
}

/// See u2moe_stream_options.
struct StreamOptions : StreamNumbers, EndpointOptions {
  static constexpr int kFullContext = U2MOE_FULL_CONTEXT;

  /// Options with the defaults of a bundle.
  explicit StreamOptions(const Manifest& m) : StreamNumbers(m.numbers), EndpointOptions(m) {}

  int chunk_size = 0;
  Search search = Search::kDefault;
  bool endpoint = true;
  std::shared_ptr<const ContextGraph> hotwords = nullptr;
  std::shared_ptr<const Fusion> language_model = nullptr;
  std::shared_ptr<const PhraseGraph> grammar = nullptr;
  bool written = false;

  bool has_beam() const {
    return std::none_of(std::begin(kSearches), std::end(kSearches), [this](const SearchName& each) { return each.search == search && !each.has_beam; });
  }

  /// Return these options, with the bundle's value for each option that is not set.
  /// @throws InvalidArgument or StreamError if an option is out of range or not supported by the bundle.
  StreamOptions for_bundle(const Manifest& m, const Vocabulary& vocabulary) const {
    check_range("chunk_size", chunk_size, kFullContext, 10000);
    check_numbers<StreamNumbers>(*this);
    if (pause != 0) check_range("pause", pause, kShortestPauseS, 1e9);
    check_range("turn", turn, 0, 1);
    for (const std::optional<EndpointRule>& rule : rules) {
      if (!rule) continue;
      check_range("min_trailing_silence", rule->min_trailing_silence, 0, 1e9);
      check_range("min_utterance_length", rule->min_utterance_length, 0, 1e9);
      if (!rule->is_valid()) fail<InvalidArgument>("endpoint rules need silence or a length above 0 seconds");
    }
    if (hotwords && !hotwords->is_of(vocabulary)) fail<InvalidArgument>("hotwords are for the vocabulary of another bundle");
    if (language_model && !language_model->is_of(vocabulary)) {
      fail<InvalidArgument>("the language model was opened for the vocabulary of another bundle");
    }
    if (!has_beam() && (hotwords || language_model || grammar)) {
      fail<InvalidArgument>("hotwords, a grammar and a language model need a prefix beam search or rescoring");
    }
    if (grammar && (hotwords || language_model)) fail<InvalidArgument>("a grammar replaces hotwords and the language model: pass only one of them");
    if (chunk_size == kFullContext && !endpoint) {
      fail<InvalidArgument>("full context needs endpoint rules: without them, memory grows with the square of its length");
    }
    StreamOptions definite = *this;
    const int trained = m.static_chunk_size;
    if (chunk_size == 0 || (chunk_size == kFullContext && trained && m.streaming)) {
      definite.chunk_size = trained ? trained : ((kStreamChunkSize - 1) / m.chunk_multiple + 1) * m.chunk_multiple;
    }
    if (definite.chunk_size != kFullContext && !m.streaming) {
      fail<StreamError>("this bundle's encoder cannot stream: it was trained for full context (chunk_size U2MOE_FULL_CONTEXT)");
    }
    if (m.form && (definite.chunk_size != m.form->chunk_size || (num_left_chunks >= 0 && num_left_chunks != m.form->num_left_chunks))) {
      fail<StreamError>("this bundle supports only chunk_size " + std::to_string(m.form->chunk_size) + " and num_left_chunks " +
                        std::to_string(m.form->num_left_chunks) + ", got chunk_size " + std::to_string(definite.chunk_size) +
                        " and num_left_chunks " + std::to_string(num_left_chunks));
    }
    if (definite.chunk_size != kFullContext && definite.chunk_size % m.chunk_multiple) {
      fail<StreamError>("chunk_size must be a multiple of " + std::to_string(m.chunk_multiple) + " for this encoder, got " +
                        std::to_string(definite.chunk_size));
    }
    if ((search == Search::kAttentionRescoring || search == Search::kAttention) && !m.has_decoder) {
      fail<StreamError>("this search needs a decoder, and this bundle has none (CTC only)");
    }
    if (search == Search::kDefault) definite.search = m.has_decoder ? Search::kAttentionRescoring : Search::kCtcPrefixBeam;
    return definite;
  }
};

/// Token sequences in one array [number, longest], padded with eos, and their lengths.
struct Sequences {
  Sequences(const std::vector<std::vector<int>>& sequences, int eos) {
    for (const std::vector<int>& each : sequences) longest = std::max(longest, each.size());
    for (const std::vector<int>& each : sequences) {
      tokens.insert(tokens.end(), each.begin(), each.end());
      tokens.insert(tokens.end(), longest - each.size(), eos);
      lengths.push_back(static_cast<std::int64_t>(each.size()));
    }
  }

  std::size_t longest = 1;
  std::vector<std::int64_t> tokens, lengths;
};

/// A graph that the caller must run before recognition continues, and its inputs.
struct Request {
  enum class Graph { kEncoder = 1, kCtc, kDecoder, kVad };

  Graph graph;
  const Floats* input;                   ///< window of features, or encoder output
  const Sequences* sequences = nullptr;  ///< for the decoder
  // For the encoder. `begins`: whether it begins with initial caches. `kept`: encoder frames to keep in growing caches before
  // the run. `required`: encoder frames of left context to keep for the next run. For both numbers, -1 means all.
  bool begins = false;
  std::int64_t kept = -1, required = -1;
};

/// Recognises samples at the model's rate. `StreamState` has functions of the same names and documents them.
class Recognition {
 public:
  Recognition(const Manifest& manifest, const Vocabulary& vocabulary, const StreamOptions& options)
      : manifest_(&manifest), vocabulary_(options.grammar ? &options.grammar->vocabulary() : &vocabulary), options_(options.for_bundle(manifest, vocabulary)),
        extractor_(m(), extractor_chunk_size(), has_full_context(), options_.padding_s), search_(new_search()),
        endpointer_(options_.rules, m().frame_s(), m().blank, knows_ends() ? options_.turn : 0),
        pause_rule_(options_.endpoint ? options_.pause : 0, m().frame_s(), m().frame_shift_ms / 1000), commits_(!has_full_context()) {}

  const StreamOptions& options() const { return options_; }
  bool is_finished() const { return extractor_.is_finished(); }
  void accept(Floats samples) { extractor_.accept(std::move(samples)); }
  void finish() { extractor_.finish(); }

  std::optional<Request> next() {
    while (!request_ && begin_step()) {}
    return request_;
  }

  void give(Floats output) {
    const Request::Graph graph = request_->graph;
    request_.reset();
    if (graph == Request::Graph::kEncoder) {
      frames_.output = std::move(output);
      request_ = Request{Request::Graph::kCtc, &frames_.output};
    } else if (alone_) {
      conclude_alone(output);
    } else if (is_cutting_) {
      is_cutting_ = false;
      cut(output);
      begin_second_pass();
    } else {
      frames_.log_probs = std::move(output);
      advance(frames_);
    }
  }

  void give(const TokenScores& scores) {
    request_.reset();
    if (alone_) {
      alone_->advance(scores.next);
      return search_alone();
    }
    const double rescoring_weight = options_.language_model ? options_.language_model->rescoring_weight() : 1;
    std::vector<Ranked> ranked = attention_rescoring(std::move(hypotheses_), scores, options_, rescoring_weight);
    for (Ranked& each : ranked) {
      if (!has_rest()) break;
      each.hypothesis = found_[each.place];
      const std::vector<std::size_t>& begins = begins_[each.place];
      std::vector<double> probabilities;
      for (std::size_t i = 0; i + 1 < begins.size(); ++i) probabilities.push_back(least(each.probabilities, begins[i], begins[i + 1]));
      each.probabilities = std::move(probabilities);
    }
    conclude(std::move(ranked));
  }
  std::vector<Result> take_segments() { return std::exchange(segments_, {}); }

  Result result() const {
    if (last_) return *last_;
    if (partial_) return *partial_;
    Result result;
    result.segment = number_;
    const Hypothesis best = search_->best();
    result.text = vocabulary_->text(best.tokens);
    result.tokens = best.tokens;
    result.times = seconds(best.times);
    result.committed = vocabulary_->text(committed_);
    result.num_committed = static_cast<int>(vocabulary_->words(committed_).size());
    result.committed_end = seconds({commits_ ? search_->next_peak() : 0})[0];
    for (const auto& [begin, end, probability] : phrases_) {
      const std::vector<double> times = seconds({best.times[begin], best.times[end - 1] + 1});
      result.phrases.push_back({vocabulary_->text(part(committed_, begin, end)), times[0], times[1], calibrated(m(), probability)});
    }
    return presented(std::move(result));
  }

 private:
  static constexpr double kLongestWindowS = 30;  // maximum seconds encoded at once with full context

  struct Frames {
    Floats output, log_probs;
  };

  template <class T>
  static std::vector<T> part(const std::vector<T>& items, std::size_t begin, std::size_t end) {
    return {items.begin() + static_cast<std::ptrdiff_t>(begin), items.begin() + static_cast<std::ptrdiff_t>(end)};
  }

  static double least(const std::vector<double>& items, std::size_t begin, std::size_t end) {
    const std::vector<double> own = part(items, begin, end);
    return *std::min_element(own.begin(), own.end());
  }

  // Return `rows` [rows, width] without the first `num`.
  static Floats after(const Floats& rows, std::size_t num, std::size_t width) {
    return {rows.begin() + static_cast<std::ptrdiff_t>(num * width), rows.end()};
  }

  Frames after(const Floats& output, const Floats& log_probs, std::size_t num) const { return {after(output, num, dim()), after(log_probs, num, vocab())}; }

  static void append(Floats& all, const Floats& more) { all.insert(all.end(), more.begin(), more.end()); }

  const Manifest& m() const { return *manifest_; }
  std::size_t vocab() const { return static_cast<std::size_t>(m().vocab_size); }
  std::size_t dim() const { return static_cast<std::size_t>(m().output_size); }
  bool has_full_context() const { return options_.chunk_size == StreamOptions::kFullContext; }
  bool has_rest() const { return options_.grammar && options_.grammar->rest() >= 0; }
  bool knows_ends() const { return options_.language_model && options_.language_model->knows_ends(); }

  std::unique_ptr<CtcSearch> new_search() const {
    if (!options_.has_beam()) return std::make_unique<GreedySearch>(m().blank, options_.blank_penalty);
    const auto states = options_.language_model ? Fusion::states(options_.language_model) : nullptr;
    return std::make_unique<PrefixBeamSearch>(static_cast<std::size_t>(options_.beam_size), m().blank, options_.hotwords, states,
                                              options_.blank_penalty, options_.grammar);
  }

  int extractor_chunk_size() const {
    if (!has_full_context()) return options_.chunk_size;
    return static_cast<int>(std::nearbyint((kLongestWindowS + 2 * options_.padding_s) / m().frame_s()));
  }

  // Do one step: request a graph, or do work that needs none. Return false if there is nothing to do.
  bool begin_step() {
    if (endpoint_ || (extractor_.is_exhausted() && !last_)) {  // the first pass of the utterance is complete
      begin_end();
    } else if (has_full_context() && num_frames_ > 0 && !last_) {
      // The utterance may continue after this window. If it fills most of the window, end it within the window; otherwise
      // encode it again with the next audio.
      is_left_open_ = 2 * num_frames_ > extractor_.num_window_frames();
      is_left_open_ ? begin_end() : repeat();
    } else if (extractor_.has_window()) {
      begin_window();
    } else {
      return false;
    }
    return true;
  }

  void begin_window() {
    extractor_.take_window();
    if (has_full_context()) {
      const auto end = pause_rule_.end_of_window(extractor_.window_levels(), start_, extractor_.window_is_full(), extractor_.is_exhausted());
      if (end) extractor_.shorten_window(*end);
    }
    window_ = extractor_.window();
    const bool begins = std::exchange(is_at_start_, false) || has_full_context();
    const std::int64_t kept = std::exchange(num_kept_, -1), num = options_.num_left_chunks;
    const std::int64_t required = has_full_context() ? 0 : num < 0 ? -1 : num * options_.chunk_size;
    request_ = Request{Request::Graph::kEncoder, &window_, nullptr, begins, begins ? -1 : kept, required};
  }

  // Start the steps that end the utterance. If it ends within speech, first move its end to a gap between two words.
  void begin_end() {
    is_cutting_ = num_frames_ > 0 && (is_left_open_ || (endpoint_ && static_cast<double>(endpoint_->trailing_silence) * m().frame_s() < kShortestPauseS));
    if (is_cutting_) request_ = Request{Request::Graph::kCtc, &output_};
    else begin_second_pass();
  }

  void begin_second_pass() {
    if (options_.search == Search::kAttention && !output_.empty()) {
      alone_.emplace(m(), num_frames_, static_cast<std::size_t>(options_.beam_size), options_.length_penalty);
      return search_alone();
    }
    search_->finish();
    hypotheses_ = search_->hypotheses();
    if (options_.search == Search::kAttentionRescoring && !output_.empty() && !hypotheses_.empty()) {
      if (has_rest()) found_ = hypotheses_;
      begins_.clear();
      for (Hypothesis& each : hypotheses_) begins_.push_back(hear(each));
      std::vector<std::vector<int>> sequences;
      for (const Hypothesis& hypothesis : hypotheses_) sequences.push_back(hypothesis.tokens);
      return ask_decoder(sequences);
    }
    conclude(unranked());
  }

  void ask_decoder(const std::vector<std::vector<int>>& sequences) {
    sequences_.emplace(sequences, m().eos);
    request_ = Request{Request::Graph::kDecoder, &output_, &*sequences_};
  }

  // Step the decoder-only search. When it ends, request the CTC output to find the times of the best hypothesis.
  void search_alone() {
    const std::vector<std::vector<int>> growing = alone_->growing();
    if (growing.empty()) request_ = Request{Request::Graph::kCtc, &output_};
    else ask_decoder(growing);
  }

  void conclude_alone(const Floats& log_probs) {
    hypotheses_ = alone_->hypotheses();
    alone_.reset();
    Hypothesis& best = hypotheses_[0];
    const auto is_special = [this](int token) { return token == m().blank || token == m().sos || token == m().eos; };
    const auto aligned = std::any_of(best.tokens.begin(), best.tokens.end(), is_special) ? std::nullopt : align(log_probs, vocab(), best.tokens, m().blank);
    for (std::size_t i = 0; aligned && i < best.tokens.size(); ++i) {
      const auto at = [&](std::ptrdiff_t frame) { return log_probs[static_cast<std::size_t>(frame) * vocab() + static_cast<std::size_t>(best.tokens[i])]; };
      std::ptrdiff_t peak = (*aligned)[i].start;
      for (std::ptrdiff_t frame = peak; frame < (*aligned)[i].end; ++frame) peak = at(frame) > at(peak) ? frame : peak;
      best.times.push_back(static_cast<int>(peak));
      best.probabilities.push_back(std::min(std::exp(static_cast<double>(at(peak))), 1.0));
    }
    conclude(unranked());
  }

  std::vector<Ranked> unranked() const {
    std::vector<Ranked> ranked;
    for (const Hypothesis& hypothesis : hypotheses_) ranked.push_back({hypothesis, hypothesis.score, 0, hypothesis.probabilities});
    return ranked;
  }

  void search_on(const float* log_probs, std::size_t num) {
    search_->advance(log_probs, num, vocab());
    const auto blank = static_cast<std::size_t>(m().blank);
    for (std::size_t frame = 0; frame < num && has_rest(); ++frame) {
      const float* const row = log_probs + frame * vocab();
      std::size_t best = blank == 0 ? 1 : 0;
      for (std::size_t token = 0; token < vocab(); ++token) best = token != blank && row[token] > row[best] ? token : best;
      loudest_.emplace_back(static_cast<int>(best), row[best] > row[blank]);
    }
  }

  // For the second pass, replace words outside the grammar by the most probable tokens, each with a penalty. Return where
  // each original token begins in the new sequence, followed by the length of the new sequence.
  std::vector<std::size_t> hear(Hypothesis& found) const {
    std::vector<std::size_t> begins;
    const std::vector<int> tokens = found.tokens;
    if (!has_rest() || std::find(tokens.begin(), tokens.end(), options_.grammar->rest()) == tokens.end()) {
      begins.resize(tokens.size() + 1);
      std::iota(begins.begin(), begins.end(), 0);
      return begins;
    }
    found.tokens.clear();
    found.probabilities.clear();
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      begins.push_back(found.tokens.size());
      if (tokens[i] != options_.grammar->rest()) {
        found.tokens.push_back(tokens[i]);
        continue;
      }
      found.context_score -= kRestCost;
      const auto begin = static_cast<std::size_t>(found.times[i]);
      const bool is_last = i + 1 == tokens.size();
      const std::size_t end = is_last ? loudest_.size() : static_cast<std::size_t>(found.times[i + 1]) + 1;
      std::vector<std::pair<int, bool>> runs = {{loudest_[begin].first, true}};
      for (std::size_t frame = begin + 1; frame < std::min(end, loudest_.size()); ++frame) {
        if (loudest_[frame] != runs.back()) runs.push_back(loudest_[frame]);
      }
      if (!is_last && runs.size() > 1) runs.pop_back();  // the last run belongs to the next token
      for (const auto& [token, is_heard] : runs) {
        if (is_heard) found.tokens.push_back(token), found.context_score -= static_cast<double>(kRestPenalty);
      }
    }
    begins.push_back(found.tokens.size());
    return begins;
  }

  // Add encoder frames to the current utterance, up to its end.
  void advance(const Frames& frames) {
    const std::size_t all = frames.output.size() / dim();
    std::size_t num = all, num_searched = 0;
    const auto search_to = [&](std::size_t end) {
      search_on(frames.log_probs.data() + num_searched * vocab(), end - num_searched);
      num_searched = end;
    };
    const auto end_of_sentence = [&](std::size_t end) {
      search_to(end);
      return end_probability(search_->hypotheses(), *Fusion::states(options_.language_model));
    };
    if (options_.endpoint) endpoint_ = endpointer_.advance(frames.log_probs.data(), all, vocab(), end_of_sentence);
    if (endpoint_) {
      num = endpoint_->num_frames;
      surplus_ = after(frames.output, frames.log_probs, num);
    }
    num_frames_ += num;
    output_.insert(output_.end(), frames.output.begin(), frames.output.begin() + static_cast<std::ptrdiff_t>(num * dim()));
    search_to(num);
    commit();
    if (options_.endpoint && !endpoint_) endpoint_ = pause_rule_.endpoint(start_ + num_frames_, endpointer_.trailing_silence());
  }

  // Commit the words that no later partial result can change.
  void commit() {
    if (!commits_) return;
    auto [tokens, ends] = search_->settled(vocabulary_->word_starts());
    const std::vector<WordSpan> words = vocabulary_->complete_words(tokens, ends);
    if (words.empty()) return;
    tokens.resize(words.back().end);
    search_->commit(tokens);
    committed_.insert(committed_.end(), tokens.begin(), tokens.end());
    if (!options_.grammar) return;
    const auto found = options_.grammar->phrases(committed_, false);
    const std::vector<double> probabilities = search_->best().probabilities;
    for (std::size_t i = phrases_.size(); i < found.size(); ++i) {
      phrases_.emplace_back(found[i].first, found[i].second, least(probabilities, found[i].first, found[i].second));
    }
  }

  // If an utterance that ends within speech has at least two words, move its end to a gap between two of them.
  void cut(const Floats& log_probs) {
    std::vector<Hypothesis> found = search_->hypotheses(1);
    if (found.empty()) return;  // of a grammar, if the beam is too small for it
    Hypothesis& best = found[0];
    hear(best);
    const auto num = find_cut(*vocabulary_, best.tokens, log_probs, vocab(), m().blank);
    if (!num) return;
    partial_ = result();
    Frames rest = after(output_, log_probs, *num);
    append(rest.output, surplus_.output);
    append(rest.log_probs, surplus_.log_probs);
    surplus_ = std::move(rest);
    output_.resize(*num * dim());
    num_frames_ = *num;
    std::size_t num_before = 0;
    for (const int time : search_->best().times) num_before += static_cast<std::size_t>(time) < *num ? 1U : 0U;
    committed_.resize(std::min(committed_.size(), num_before));
    while (!phrases_.empty() && std::get<1>(phrases_.back()) > committed_.size()) phrases_.pop_back();
    commits_ = false;
    search_ = new_search();
    loudest_.clear();
    search_on(log_probs.data(), *num);
  }

  // Conclude the current utterance with its final result. Unless it is the last, begin the next one at its end.
  void conclude(std::vector<Ranked> ranked) {
    const bool is_last = !endpoint_ && extractor_.is_exhausted();
    Result result = presented(final_result(ranked));
    const int number = number_ + (result.text.empty() ? 0 : 1);
    if (!result.text.empty()) segments_.push_back(result);
    if (is_last) {
      last_ = std::move(result);
      output_ = {};
      return;
    }
    const Frames surplus = std::exchange(surplus_, {});
    num_kept_ = static_cast<std::int64_t>(surplus.output.size() / dim());
    num_kept_ -= num_kept_ % m().chunk_multiple;
    begin_utterance(number, start_ + num_frames_);
    advance(surplus);
    if (std::exchange(is_left_open_, false)) repeat();
  }

  // Encode the current utterance again, with more audio.
  void repeat() {
    extractor_.repeat_window(num_frames_);
    begin_utterance(number_, start_);
  }

  void begin_utterance(int number, std::size_t start) {
    extractor_.forget(start);
    number_ = number;
    start_ = start;
    num_frames_ = 0;
    output_.clear();
    endpoint_.reset();
    partial_.reset();
    endpointer_.reset();
    search_ = new_search();
    committed_.clear();
    phrases_.clear();
    loudest_.clear();
    commits_ = !has_full_context();
  }

  Result final_result(const std::vector<Ranked>& ranked) const {
    const Ranked& best = ranked.empty() ? Ranked{} : ranked[0];  // a grammar may allow no hypothesis
    const auto start = static_cast<std::int64_t>(start_), num = static_cast<std::int64_t>(num_frames_);
    Result result;
    result.is_final = true;
    result.segment = number_;
    result.tokens = best.hypothesis.tokens;
    result.times = seconds(best.hypothesis.times);
    if (!result.times.empty()) result.words = words_of(m(), *vocabulary_, best, start, num, pauses());
    if (!result.tokens.empty()) {
      result.start = result.words.empty() ? seconds({0})[0] : result.words.front().start;
      result.end = result.words.empty() ? seconds({static_cast<int>(num)})[0] : result.words.back().end;
      for (const Word& word : result.words) result.confidence += word.confidence / static_cast<double>(result.words.size());
    }
    const bool is_alone = options_.search == Search::kAttention;
    std::set<std::string> seen;
    for (const Ranked& each : ranked) {
      const std::string text = vocabulary_->text(each.hypothesis.tokens);
      if (result.nbest.size() == static_cast<std::size_t>(options_.beam_size)) break;  // hotwords can double the number
      if (!seen.insert(text).second) continue;
      result.nbest.push_back({text, each.hypothesis.tokens, each.score, is_alone ? 0 : each.hypothesis.score, each.attention_score, each.hypothesis.language_score,
                              seconds(each.hypothesis.times)});
    }
    if (!result.nbest.empty()) result.text = result.nbest[0].text, result.score = result.nbest[0].score;
    result.committed = result.text;
    const std::vector<WordSpan> spans = vocabulary_->words(result.tokens);
    result.num_committed = static_cast<int>(spans.size());
    result.committed_end = seconds({static_cast<int>(num)})[0];
    result.revised = ranked.empty() ? 0 : num_revised(vocabulary_->words(committed_), spans);
    if (!options_.grammar) return result;
    for (const auto& [begin, end] : options_.grammar->phrases(result.tokens, true)) {
      Word phrase{vocabulary_->text(part(result.tokens, begin, end)), -1, 0, 1};
      for (std::size_t i = 0; i < spans.size(); ++i) {
        if (spans[i].begin < begin || spans[i].begin >= end) continue;
        const Word& word = result.words[i];
        phrase = {phrase.text, phrase.start < 0 ? word.start : phrase.start, word.end, std::min(phrase.confidence, word.confidence)};
      }
      result.phrases.push_back(phrase);
    }
    return result;
  }

  // Return a result in the requested text format, with times counted from the start of the source, not of the padding.
  Result presented(Result result) const {
    if (options_.written) result = written(std::move(result), *vocabulary_);
    if (options_.padding_s <= 0) return result;
    const double lead = extractor_.lead_s(), end = extractor_.end_s();
    return timed(std::move(result), [=](double time) { return rounded(std::min(std::max(time - lead, 0.0), end)); });
  }

  std::vector<double> seconds(const std::vector<int>& times) const {
    std::vector<double> found;
    for (int time : times) found.push_back(rounded((static_cast<double>(start_) + time) * m().frame_s()));
    return found;
  }

  // Start and end of each pause in the current utterance, in seconds from the first sample of the stream.
  std::vector<Seconds> pauses() const {
    const std::vector<float> levels = extractor_.levels(num_frames_ * static_cast<std::size_t>(m().subsampling_rate));
    std::vector<Seconds> found = find_pauses(levels, m().frame_shift_ms / 1000);
    const double begin = static_cast<double>(start_) * m().frame_s();
    for (Seconds& pause : found) pause = {begin + pause.first, begin + pause.second};
    return found;
  }

  const Manifest* manifest_;
  const Vocabulary* vocabulary_;
  StreamOptions options_;

  FeatureExtractor extractor_;
  std::unique_ptr<CtcSearch> search_;
  Endpointer endpointer_;
  PauseRule pause_rule_;
  std::optional<Request> request_;
  Floats window_;                           // of the request
  std::vector<Hypothesis> hypotheses_;
  std::optional<Sequences> sequences_;      // of the request
  std::optional<AttentionSearch> alone_;    // search with only the decoder, at the end of an utterance
  bool is_cutting_ = false;                 // the requested log-probabilities are for `cut`
  bool is_left_open_ = false;               // the utterance may continue, but fills most of a window
  bool is_at_start_ = true;                 // the encoder has not run yet
  std::int64_t num_kept_ = -1;              // `kept` of the next encoder request
  int number_ = 0;                          // of the current utterance
  std::size_t start_ = 0, num_frames_ = 0;  // encoder frames of the current utterance
  Floats output_;
  std::vector<int> committed_;  // tokens of words that no later partial result changes
  std::vector<std::tuple<std::size_t, std::size_t, double>> phrases_;  // committed phrases: tokens, and lowest probability
  std::vector<std::pair<int, bool>> loudest_;    // by frame: most probable token except blank, and whether it exceeds blank
  std::vector<Hypothesis> found_;                // hypotheses before `hear`
  std::vector<std::vector<std::size_t>> begins_; // results of `hear`
  bool commits_ = false;        // whether words can be committed: not if frames may be encoded again
  std::optional<Endpoint> endpoint_;
  Frames frames_;                 // of the last window
  Frames surplus_;                // frames after the end of the utterance; the next utterance begins with them
  std::optional<Result> partial_; // partial result of an utterance that was cut, until its final result
  std::optional<Result> last_;    // result of the last utterance after the end of the input
  std::vector<Result> segments_;
};

}  // namespace u2moe::runtime
