// Processing of CTC output: incremental greedy and prefix beam search, token alignment, and cuts between words.
#pragma once

#include "commitment.hpp"

namespace u2moe::runtime {

struct Hypothesis {
  std::vector<int> tokens;
  double score = 0;                   ///< log-probability of all alignments, plus hotword bonus and language model score
  double context_score = 0;           ///< hotword bonus
  double language_score = 0;          ///< language model score
  std::vector<int> times;             ///< encoder frame at which each token peaks, or begins in greedy search
  std::vector<double> probabilities;  ///< probability of each token at that frame
};

/// Return log-probabilities [frames, vocab] as if a penalty had been taken from the blank before the softmax, as in Python.
inline std::vector<float> penalize_blank(const float* log_probs, std::size_t num_frames, std::size_t vocab_size, int blank, double penalty) {
  std::vector<float> rows(log_probs, log_probs + num_frames * vocab_size);
  const double lost = std::expm1(-penalty);
  for (std::size_t frame = 0; frame < num_frames; ++frame) {
    float* row = rows.data() + frame * vocab_size;
    const auto total = static_cast<float>(std::log1p(lost * std::exp(std::min(static_cast<double>(row[blank]), 0.0))));
    for (std::size_t token = 0; token < vocab_size; ++token) row[token] -= total;
    row[blank] -= static_cast<float>(penalty);
  }
  return rows;
}

/// A CTC search that continues from chunk to chunk.
class CtcSearch {
 public:
  /// @param blank_penalty see `penalize_blank`.
  CtcSearch(int blank, double blank_penalty) : blank_(blank), blank_penalty_(blank_penalty) {}
  virtual ~CtcSearch() = default;

  /// Process log-probabilities [frames, vocab].
  void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
    if (blank_penalty_ == 0) return search(log_probs, num_frames, vocab_size);
    search(penalize_blank(log_probs, num_frames, vocab_size, blank_, blank_penalty_).data(), num_frames, vocab_size);
  }

  /// End the input. Incomplete hotwords lose their bonus, and the language model scores the last word.
  virtual void finish() {}

  /// Hypotheses so far, best first. With hotwords, their number can be twice the beam size.
  virtual std::vector<Hypothesis> hypotheses(std::size_t limit = std::numeric_limits<std::size_t>::max()) const = 0;

  /// Best hypothesis that begins with the committed tokens. Without hotwords, it is the best of all hypotheses. With hotwords,
  /// another one may be better, because two searches run and score hypotheses differently.
  virtual Hypothesis best() const = 0;

  /// Return the settled tokens: they follow the committed ones, and no later frame changes them. With a grammar, the search
  /// first decides on phrases that are certain.
  /// @param word_starts whether each token begins a word.
  virtual Settled settled(const std::vector<unsigned char>& word_starts) = 0;

  /// Commit further settled tokens.
  virtual void commit(const std::vector<int>& tokens) = 0;

  /// Earliest frame at which a token after the committed ones may peak. It never decreases.
  virtual int next_peak() const = 0;

 protected:
  virtual void search(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) = 0;

  int blank_;

 private:
  double blank_penalty_;
};

/// Greedy search: the most probable token of each frame, with repeats merged and blanks removed.
class GreedySearch : public CtcSearch {
 public:
  explicit GreedySearch(int blank, double blank_penalty = 0) : CtcSearch(blank, blank_penalty) {}

  void search(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) override {
    for (std::size_t frame = 0; frame < num_frames; ++frame, ++num_frames_) {
      const float* row = log_probs + frame * vocab_size;
      const float* best = std::max_element(row, row + vocab_size);
      const int token = static_cast<int>(best - row);
      found_.score += static_cast<double>(*best);
      if (token != blank_ && token != last_) {
        found_.tokens.push_back(token);
        found_.times.push_back(num_frames_);
        found_.probabilities.push_back(std::min(std::exp(static_cast<double>(*best)), 1.0));
      }
      last_ = token;
    }
  }

  std::vector<Hypothesis> hypotheses(std::size_t) const override { return {found_}; }
  Hypothesis best() const override { return found_; }

  Settled settled(const std::vector<unsigned char>&) override {
    return {{found_.tokens.begin() + static_cast<std::ptrdiff_t>(num_committed_), found_.tokens.end()}, false};
  }

  void commit(const std::vector<int>& tokens) override { num_committed_ += tokens.size(); }
  int next_peak() const override { return num_committed_ < found_.times.size() ? found_.times[num_committed_] : num_frames_; }

 private:
  int last_ = -1, num_frames_ = 0;
  std::size_t num_committed_ = 0;
  Hypothesis found_;
};

/// CTC prefix beam search. With hotwords, two searches run in parallel, and only the second counts bonuses when it ranks
/// prefixes. Hotwords that no hypothesis contains therefore change nothing.
class PrefixBeamSearch : public CtcSearch {
 public:
  /// @param context null: no hotwords.
  /// @param states states of a language model; no other search may use them at the same time. Null: no language model.
  /// @param grammar restricts hypotheses and is used in place of hotwords and language model; null: no grammar.
  PrefixBeamSearch(std::size_t beam_size, int blank, const std::shared_ptr<const ContextGraph>& context,
                   const std::shared_ptr<FusionStates>& states, double blank_penalty, const std::shared_ptr<const PhraseGraph>& grammar)
      : CtcSearch(blank, blank_penalty), beam_size_(beam_size), sorts_(context || states), grammar_(grammar) {
    searches_.emplace_back(beam_size, blank, context, states, false, grammar_.get());
    if (context) searches_.emplace_back(beam_size, blank, context, states, true);
    for (const BeamSearch& search : searches_) commitments_.emplace_back(search);
  }

  void search(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) override {
    for (std::size_t frame = 0; frame < num_frames; ++frame) {
      const float* const row = log_probs + frame * vocab_size;
      double rest_start = kNever;
      if (grammar_) rest_start = grammar_->find(row, beam_size_, allowed_, likely_);
      else likely_.find(row, vocab_size, beam_size_);
      for (BeamSearch& search : searches_) search.advance(likely_, rest_start);
    }
    num_frames_ += static_cast<int>(num_frames);
  }

  void finish() override {
    for (BeamSearch& search : searches_) search.finish();
  }

  std::vector<Hypothesis> hypotheses(std::size_t limit) const override {
    const std::vector<const Beam*> beams = ranked();
    std::vector<Hypothesis> found;
    for (std::size_t i = 0; i < std::min(limit, beams.size()); ++i) found.push_back(hypothesis_of(*beams[i]));
    return found;
  }

  Hypothesis best() const override {
    const std::vector<const Beam*> beams = ranked();
    if (beams.empty()) return {};  // the grammar allows no hypothesis
    const auto holds = [this](const Beam* beam) {
      return std::any_of(commitments_.begin(), commitments_.end(), [&](const Commitment& each) { return each.holds_for(*beam->prefix); });
    };
    return hypothesis_of(**std::find_if(beams.begin(), beams.end(), holds));
  }

  Settled settled(const std::vector<unsigned char>& word_starts) override {
    if (grammar_) searches_[0].decide();
    std::vector<int> tokens = best().tokens;
    tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(commitments_[0].num_tokens()));
    std::size_t least = 2 * tokens.size();
    for (std::size_t i = 0; i < searches_.size(); ++i) least = std::min(least, commitments_[i].num_settled(searches_[i], tokens, word_starts));
    const bool is_whole = grammar_ && least == 2 * tokens.size() && grammar_->is_whole(searches_[0].beams()[0].prefix->phrase);
    tokens.resize(least / 2);
    return {std::move(tokens), least % 2 > 0 || is_whole};
  }

  void commit(const std::vector<int>& tokens) override {
    for (Commitment& each : commitments_) each.extend(tokens);
  }

  int next_peak() const override {
    int earliest = num_frames_;
    for (std::size_t i = 0; i < searches_.size(); ++i) earliest = commitments_[i].next_peak(searches_[i], earliest);
    return earliest;
  }

 private:
  // Beams of the first search, and those of the second that have a bonus and tokens of their own. The best comes first.
  std::vector<const Beam*> ranked() const {
    std::vector<const Beam*> beams;
    for (const Beam& beam : searches_[0].beams()) beams.push_back(&beam);
    if (searches_.size() > 1) {
      std::set<std::vector<int>> known;
      for (const Beam* beam : beams) known.insert(beam->prefix->tokens());
      for (const Beam& beam : searches_[1].beams()) {
        if (beam.prefix->bonus > 0 && !known.count(beam.prefix->tokens())) beams.push_back(&beam);
      }
    }
    const auto better = [](const Beam* one, const Beam* other) { return one->score() > other->score(); };
    if (sorts_) std::stable_sort(beams.begin(), beams.end(), better);
    return beams;
  }

  static Hypothesis hypothesis_of(const Beam& beam) {
    Hypothesis found{beam.prefix->tokens(), beam.score(), beam.prefix->bonus, beam.prefix->language_score, {}, {}};
    for (const Peak* peak = beam.times; peak; peak = peak->before) {
      found.times.push_back(peak->frame);
      found.probabilities.push_back(std::min(std::exp(peak->score), 1.0));
    }
    std::reverse(found.times.begin(), found.times.end());
    std::reverse(found.probabilities.begin(), found.probabilities.end());
    return found;
  }

  std::size_t beam_size_;
  bool sorts_;
  std::shared_ptr<const PhraseGraph> grammar_;
  std::vector<float> allowed_;
  int num_frames_ = 0;
  LikelyTokens likely_;
  std::deque<BeamSearch> searches_;
  std::vector<Commitment> commitments_;  // one for each search
};

/// Probability of a sentence end according to the language model: the mean over the hypotheses, weighted by their
/// probabilities. The best hypothesis must come first.
inline double end_probability(const std::vector<Hypothesis>& hypotheses, FusionStates& states) {
  double total = 0, ends = 0;
  for (const Hypothesis& each : hypotheses) {
    const double share = std::exp(each.score - hypotheses[0].score);
    total += share;
    ends += share * states.end_probability(each.tokens);
  }
  return ends / total;
}

/// Frames of a token.
struct FrameSpan {
  std::ptrdiff_t start = -1, end = -1;
};

/// Align tokens to log-probabilities [frames, vocab] along the most probable path. None: there are too few frames.
inline std::optional<std::vector<FrameSpan>> align(const std::vector<float>& log_probs, std::size_t vocab_size,
                                                   const std::vector<int>& tokens, int blank) {
  if (tokens.empty()) return std::vector<FrameSpan>{};
  std::vector<int> states = {blank};
  for (int token : tokens) states.insert(states.end(), {token, blank});
  const std::size_t num = states.size(), num_frames = log_probs.size() / vocab_size;
  std::vector<unsigned char> steps(num_frames * num);
  // Paths begin in the first blank, before the first frame. The blank between two different tokens is optional.
  std::vector<double> scores(num, kNever), arrived(num);
  scores[0] = 0;
  for (std::size_t frame = 0; frame < num_frames; ++frame) {
    for (std::size_t state = 0; state < num; ++state) {
      unsigned char step = 0;
      double best = scores[state];
      if (state >= 1 && scores[state - 1] > best) {
        step = 1;
        best = scores[state - 1];
      }
      const bool may_skip = state >= 3 && state % 2 == 1 && states[state] != states[state - 2];
      if (may_skip && scores[state - 2] > best) {
        step = 2;
        best = scores[state - 2];
      }
      steps[frame * num + state] = step;
      arrived[state] = best + static_cast<double>(log_probs[frame * vocab_size + static_cast<std::size_t>(states[state])]);
    }
    scores.swap(arrived);
  }
  std::size_t last = num_frames && scores[num - 2] >= scores[num - 1] ? num - 2 : num - 1;
  if (!(scores[last] > kNever)) return std::nullopt;
  std::vector<FrameSpan> spans(tokens.size());
  for (std::size_t frame = num_frames; frame-- > 0;) {
    if (last % 2 == 1) {
      FrameSpan& span = spans[(last - 1) / 2];
      if (span.end < 0) span.end = static_cast<std::ptrdiff_t>(frame) + 1;
      span.start = static_cast<std::ptrdiff_t>(frame);
    }
    last -= steps[frame * num + last];
  }
  return spans;
}

/// Return the number of frames before the cut. The cut lies in the longest pause between words in the second half of frames,
/// or else in the last pause. Return nullopt if there are fewer than two words, or too few frames.
inline std::optional<std::size_t> find_cut(const Vocabulary& vocabulary, const std::vector<int>& tokens,
                                           const std::vector<float>& log_probs, std::size_t vocab_size, int blank) {
  const auto aligned = align(log_probs, vocab_size, tokens, blank);
  const std::vector<WordSpan> words = vocabulary.words(tokens);
  if (!aligned || words.size() < 2) return std::nullopt;
  const auto num_frames = static_cast<std::ptrdiff_t>(log_probs.size() / vocab_size);
  std::optional<FrameSpan> longest, final;
  for (std::size_t i = 1; i < words.size(); ++i) {
    final = FrameSpan{(*aligned)[words[i - 1].end - 1].end, (*aligned)[words[i].begin].start};
    const bool is_late = final->start + final->end >= num_frames;
    const auto length = [](const FrameSpan& pause) { return pause.end - pause.start; };
    if (is_late && (!longest || length(*final) >= length(*longest))) longest = final;
  }
  const FrameSpan pause = longest ? *longest : *final;
  return static_cast<std::size_t>((pause.start + pause.end + 1) / 2);
}

}  // namespace u2moe::runtime
