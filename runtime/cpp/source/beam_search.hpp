// CTC prefix beam search, frame by frame, with language model scores and hotword bonuses. Results equal those of
// runtime/decoding/beam_search.py and those of WeNet, even for ties.
#pragma once

#include "fusion.hpp"
#include "grammar.hpp"

namespace u2moe::runtime {

constexpr double kNever = -std::numeric_limits<double>::infinity();

// The search can decide on a grammar phrase when at least kSureAfter frames have followed the phrase's last peak. Hypotheses
// with the phrase must have at least half of the total probability, and at least the share kSure of the probability that
// remains when other hypotheses with words outside the grammar are left out.
constexpr double kSure = 0.99;
constexpr int kSureAfter = 4;

/// A token sequence as a node of a tree. Equal sequences share one node while any beam needs it.
struct Prefix {
  Prefix* before = nullptr;                       ///< the prefix without its last token
  int token = -1;
  std::size_t depth = 0;                          ///< number of tokens
  Prefix *extensions = nullptr, *next = nullptr;  ///< first extension by one token, and next extension of the same parent
  std::size_t place = kNone;                      ///< index among the beams
  std::uint64_t needed = 0;                       ///< see `Nodes`
  std::size_t state = 0;                          ///< hotword state after the prefix
  double earned = 0;                              ///< bonus of complete hotwords
  double bonus = 0;                               ///< `earned` plus a share of the bonus of an incomplete hotword
  FusionStatePtr language = nullptr;              ///< language model state after the prefix
  double spoken = 0;                              ///< language model score of complete words
  double language_score = 0;                      ///< `spoken` plus the score of the best completion of the last word
  double extra = 0;                               ///< scores that ranking adds to the log-probability of the alignments
  PhraseState phrase = {};                        ///< grammar state after the prefix

  /// Token ids from index `begin` to the last.
  std::vector<int> tokens(std::size_t begin = 0) const {
    std::vector<int> result;
    for (const Prefix* node = this; node->depth > begin; node = node->before) result.push_back(node->token);
    std::reverse(result.begin(), result.end());
    return result;
  }

  /// Prefix of the first `length` tokens; null if there are fewer.
  const Prefix* ancestor(std::size_t length) const {
    const Prefix* node = this;
    while (node->depth > length) node = node->before;
    return node->depth == length ? node : nullptr;
  }

  /// Extension by the token `by`; null if the tree has no such node.
  Prefix* extension(int by) const {
    Prefix* found = extensions;
    while (found && found->token != by) found = found->next;
    return found;
  }
};

/// A token's peak, in a list that is linked from the last token to the first. Beams share parts of these lists.
struct Peak {
  Peak* before = nullptr;
  int frame = 0;
  double score = 0;
  std::uint64_t needed = 0;
};

/// Pool of nodes. Needed nodes and their predecessors are kept; all others are reused.
template <class Node>
class Nodes {
 public:
  static constexpr std::uint64_t kAlways = std::numeric_limits<std::uint64_t>::max();

  Nodes() = default;
  Nodes(const Nodes&) = delete;
  Nodes& operator=(const Nodes&) = delete;

  Node* add(Node node) {
    if (free_.empty()) free_.push_back(&all_.emplace_back());
    Node* place = free_.back();
    free_.pop_back();
    *place = std::move(node);
    return place;
  }

  bool are_many() const { return all_.size() - free_.size() > most_; }

  /// Mark a node and its predecessors as needed until the next collection.
  void need(Node* node) const {
    for (; node && !is_needed(node); node = node->before) node->needed = round_;
  }

  bool is_needed(const Node* node) const { return node->needed >= round_; }

  /// Free the nodes that are not needed, and call `visit` with each remaining node.
  template <class Visit>
  void collect(Visit visit) {
    free_.clear();
    for (Node& node : all_) {
      if (is_needed(&node)) visit(node);
      else free_.push_back(&node);
    }
    most_ = std::max(kFew, 2 * (all_.size() - free_.size()));
    ++round_;
  }

 private:
  static constexpr std::size_t kFew = 512;

  std::deque<Node> all_;
  std::vector<Node*> free_;
  std::size_t most_ = kFew;
  std::uint64_t round_ = 1;
};

/// A prefix with the log-probabilities of its alignments: `blank` for those that end in blank, `token` for those that end in
/// the last token, `total` for all. The `best` members belong to the single best alignment of each kind, and the `times`
/// members are the peaks of that alignment. `rank` is `total` plus the prefix's `extra`.
struct Beam {
  Prefix* prefix = nullptr;
  double blank = kNever, token = kNever, total = kNever, rank = kNever;
  double best = kNever, best_blank = kNever, best_token = kNever;
  Peak *times = nullptr, *blank_times = nullptr, *token_times = nullptr;

  double score() const { return total + prefix->bonus + prefix->language_score; }

  /// The earlier of `most` and the earliest peak of the token at index `number`. Peaks are taken from two alignments: the
  /// best that ends in a blank, and the best that ends in a token.
  int earliest_peak(std::size_t number, int most) const {
    if (number >= prefix->depth) return most;
    for (const Peak* peak : {blank_times, token_times}) {
      for (std::size_t place = prefix->depth - 1; peak && place > number; --place) peak = peak->before;
      if (peak) most = std::min(most, peak->frame);
    }
    return most;
  }

  void add_blank(double score) {
    best = best_blank = best + score;
    blank = total = total + score;
    rank = total + prefix->extra;
    blank_times = times;
    token = best_token = kNever;
    token_times = nullptr;
  }
};

/// Keeps the best prefixes from frame to frame. `PrefixBeamSearch` runs one or two of these searches.
class BeamSearch {
 public:
  /// @param states the language model's states; null: no language model.
  /// @param ranks_by_bonus whether hotword bonuses affect the ranking of prefixes.
  /// @param grammar used in place of hotwords and language model; null: no grammar.
  BeamSearch(std::size_t beam_size, int blank, std::shared_ptr<const ContextGraph> context, std::shared_ptr<FusionStates> states,
                         bool ranks_by_bonus, const PhraseGraph* grammar = nullptr)
      : beam_size_(beam_size), blank_(blank), grammar_(grammar), rest_(grammar ? grammar->rest() : kNoRest), context_(std::move(context)), states_(std::move(states)), ranking_(ranks_by_bonus ? context_ : nullptr),
        most_bonus_(ranking_ ? ranking_->most_gain() : 0), most_gain_(most_bonus_ + (states_ ? states_->fusion().most_gain() : 0)) {
    Beam root;
    root.prefix = prefixes_.add({});
    root.prefix->needed = prefixes_.kAlways;
    root.prefix->place = 0;
    if (context_) root.prefix->state = context_->start();
    if (states_) root.prefix->language = states_->start();
    if (grammar_) root.prefix->phrase = grammar_->start();
    root.blank = root.total = root.rank = root.best = root.best_blank = root.best_token = 0;
    beams_.push_back(root);
  }

  /// Process one frame.
  /// @param rest_start log-probability of the grammar's `rest` at the start of a word.
  void advance(const LikelyTokens& likely, double rest_start = kNever) {
    rest_start_ = rest_start;
    const std::size_t blank_rank = std::min(likely.rank_of(blank_), likely.tokens.size()), width = 2 * beams_.size();
    const double blank_score = blank_rank < likely.tokens.size() ? likely.scores[blank_rank] : kNever;
    moved_.resize(beams_.size());
    ranked_.clear();
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& beam = beams_[index];
      const std::size_t rank = likely.rank_of(beam.prefix->token);
      Candidate stays{beam.total + blank_score, blank_rank * width + 2 * index, index, kNone};
      if (rank != kNone) {
        const std::size_t parent = beam.prefix->before->place;
        stays.order = std::min(stays.order, rank * width + 2 * index);
        if (parent != kNone) stays.order = std::min(stays.order, rank * width + 2 * parent + 1);
        if (parent != kNone || beam.token > kNever || beam.prefix->token == rest_) {
          moved_[index] = stay(index, parent, likely.scores[rank], blank_score);
          stays.rank = moved_[index].total;
          stays.token = kMoved;
        }
      }
      if (!(stays.rank > kNever)) continue;
      stays.rank += beam.prefix->extra;
      ranked_.push_back(stays);
    }
    extend(likely);
    std::sort(ranked_.begin(), ranked_.end(), [](const Candidate& one, const Candidate& other) {
      return one.rank != other.rank ? one.rank > other.rank : one.order < other.order;
    });
    if (ranked_.size() > beam_size_) ranked_.resize(beam_size_);
    next_.clear();
    for (const Candidate& each : ranked_) {
      if (each.token < kMoved) {
        next_.push_back(grown(each, likely.tokens[each.token], likely.scores[each.token]));
      } else {
        next_.push_back(each.token == kMoved ? moved_[each.beam] : beams_[each.beam]);
        if (each.token == kNone) next_.back().add_blank(blank_score);
      }
    }
    take_next();
    ++num_frames_;
    collect();
  }

  /// Find the last grammar phrase in the best prefix that is certain enough. Drop all prefixes that differ up to its end.
  void decide() {
    const Prefix* node = beams_[0].prefix;
    for (const Peak* peak = beams_[0].times; peak && node->before; peak = peak->before, node = node->before) {
      if (!node->phrase.accepts || node->token == rest_ || peak->frame + kSureAfter >= num_frames_) continue;
      double ours = 0, phrases = 0, all = 0;
      next_.clear();
      for (const Beam& beam : beams_) {
        const double share = std::exp(beam.rank - beams_[0].rank);
        const std::vector<int> tokens = beam.prefix->tokens();
        const bool is_kept = beam.prefix->ancestor(node->depth) == node;
        if (is_kept) next_.push_back(beam);
        ours += is_kept ? share : 0;
        phrases += is_kept || std::find(tokens.begin(), tokens.end(), rest_) == tokens.end() ? share : 0;
        all += share;
      }
      if (ours >= std::max(kSure * phrases, all / 2)) return take_next();
    }
  }

  /// End the input. Incomplete hotwords lose their bonus. The language model scores the last word and the sentence end.
  /// Hypotheses that end within a grammar phrase are dropped.
  void finish() {
    const auto is_open = [this](const Beam& beam) { return grammar_ && !beam.prefix->phrase.accepts; };
    beams_.erase(std::remove_if(beams_.begin(), beams_.end(), is_open), beams_.end());
    for (Beam& beam : beams_) {
      Prefix& prefix = *beam.prefix;
      if (context_) prefix.bonus = prefix.earned + context_->finish(prefix.state);
      if (states_ && prefix.before) prefix.language_score = prefix.spoken + states_->finish(*prefix.language);
    }
  }

  const std::vector<Beam>& beams() const { return beams_; }  ///< beams, best first

 private:
  static constexpr int kNoRest = -2;

  void take_next() {
    for (const Beam& beam : beams_) beam.prefix->place = kNone;
    beams_.swap(next_);
    for (std::size_t index = 0; index < beams_.size(); ++index) beams_[index].prefix->place = index;
  }

  // Log-probability of a token that extends a prefix. The token `rest` begins a word outside the grammar, at a cost.
  double entered(const Prefix& prefix, int token, double score) const {
    return token != rest_ ? score : (prefix.phrase.is_apart ? score : rest_start_) - kRestCost;
  }

  static double log_add(double a, double b) {
    if (a < b) std::swap(a, b);
    return b == kNever ? a : a + std::log1p(std::exp(b - a));
  }

  // A prefix that stays in the beam, or the extension of a prefix by a token. `token` is the rank of the new token. For a
  // prefix that stays, `token` is kNone if its alignments gain only a blank, otherwise kMoved. `order` breaks ties: it is the
  // position at which WeNet first reaches the candidate.
  struct Candidate {
    double rank;
    std::size_t order, beam, token;
  };
  static constexpr std::size_t kMoved = kNone - 1;

  // Add to `ranked_` the extensions that may be among the best candidates.
  void extend(const LikelyTokens& likely) {
    const std::vector<int>& tokens = likely.tokens;
    const auto first = static_cast<std::size_t>(!tokens.empty() && tokens[0] == blank_);
    if (first == tokens.size()) return;
    // Heap of the best ranks, lowest on top. A candidate below that is not among the best; an equal one may be, by its `order`.
    best_.assign(beam_size_, kNever);
    std::transform(ranked_.begin(), ranked_.end(), best_.begin(), [](const Candidate& stays) { return stays.rank; });
    std::make_heap(best_.begin(), best_.end(), std::greater<>());
    const std::size_t width = 2 * beams_.size();
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& beam = beams_[index];
      const Prefix& prefix = *beam.prefix;
      if (beam.rank + most_gain_ + likely.scores[first] < best_.front()) break;  // later beams rank even lower
      const FusionState::Losses losses = states_ ? states_->losses(*prefix.language) : FusionState::Losses{};
      const double most = beam.rank + losses.most + most_bonus_;
      for (std::size_t rank = first; rank < tokens.size() && most + likely.scores[rank] >= best_.front(); ++rank) {
        const int token = tokens[rank];
        const Prefix* known = prefix.extension(token);
        if (token == blank_ || (known && known->place != kNone) || (grammar_ && !grammar_->allows(prefix.phrase, token))) continue;  // no new prefix, or not allowed
        const double total = (token == prefix.token ? beam.blank : beam.total) + entered(prefix, token, likely.scores[rank]);
        double score = total;
        if (known) {
          score += known->extra;
        } else if (states_) {
          const double bonus_of_both = bonus(prefix, token);
          const Fusion& fusion = states_->fusion();
          const double loss = fusion.ends_word(token) ? losses.ending : losses.going_on;
          if (score + bonus_of_both + (prefix.language_score + fusion.gain(token) + loss) < best_.front()) continue;
          const FusionState::Move& move = states_->advance(*prefix.language, token);
          score += prefix.spoken + move.score + move.open + bonus_of_both;
        } else {
          score += bonus(prefix, token);
        }
        if (score < best_.front() || total == kNever) continue;
        std::pop_heap(best_.begin(), best_.end(), std::greater<>());
        best_.back() = score;
        std::push_heap(best_.begin(), best_.end(), std::greater<>());
        ranked_.push_back({score, rank * width + 2 * index + 1, index, rank});
      }
    }
  }

  // Update prefix `index` for a frame in which its last token is likely. In the prefix's new alignments,
  // this frame is blank, repeats the token, or adds the token to an alignment of the parent.
  Beam stay(std::size_t index, std::size_t parent, double score, double blank_score) {
    const Beam& old = beams_[index];
    Beam beam;
    beam.prefix = old.prefix;
    beam.blank = old.total + blank_score;
    const bool goes_on = old.prefix->token == rest_;  // `rest` also continues after blanks
    beam.token = (goes_on ? old.total : old.token) + score;
    beam.best_blank = old.best + blank_score;
    beam.blank_times = old.times;
    if (parent < index) grow(beam, beams_[parent], score);
    const double repeats = (goes_on ? old.best : old.best_token) + score;
    if (beam.best_token < repeats) {
      // Move the last token's peak to this frame, unless an alignment of the parent reached the token in this frame.
      if (goes_on) beam.token_times = old.times;
      else if (beam.best_token == kNever && old.token_times) beam.token_times = peaks_.add({old.token_times->before, num_frames_, score});
      beam.best_token = repeats;
    }
    if (parent != kNone && parent > index) grow(beam, beams_[parent], score);
    beam.total = log_add(beam.blank, beam.token);
    beam.rank = beam.total + beam.prefix->extra;
    const bool is_blank = beam.best_blank > beam.best_token;
    beam.best = is_blank ? beam.best_blank : beam.best_token;
    beam.times = is_blank ? beam.blank_times : beam.token_times;
    return beam;
  }

  // Return the beam for the prefix that consists of the candidate's prefix and `token`.
  Beam grown(const Candidate& candidate, int token, double score) {
    const Beam& parent = beams_[candidate.beam];
    Beam beam;
    beam.prefix = child(parent.prefix, token);
    grow(beam, parent, score);
    beam.total = beam.token;
    beam.rank = candidate.rank;
    beam.best = beam.best_token;
    beam.times = beam.token_times;
    return beam;
  }

  // Extend the parent's alignments by the beam's last token, and add them to the beam.
  void grow(Beam& beam, const Beam& parent, double score) {
    const double from = entered(*parent.prefix, beam.prefix->token, score);
    const bool again = parent.prefix->token == beam.prefix->token;  // a repeated token needs a blank before it
    const double total = again ? parent.blank : parent.total, best = again ? parent.best_blank : parent.best;
    beam.token = log_add(beam.token, total + from);
    if (beam.best_token < best + from) {
      beam.best_token = best + from;
      beam.token_times = peaks_.add({again ? parent.blank_times : parent.times, num_frames_, score});
    }
  }

  // Return the hotword bonus to add when ranking the extension of a prefix by a token.
  double bonus(const Prefix& prefix, int token) const {
    if (!ranking_) return 0;
    const ContextGraph::Move move = ranking_->advance(prefix.state, token);
    return prefix.earned + move.bonus + ranking_->partial(move.state);
  }

  // Return the extension of a prefix by a token. Reuses a node that has left the beam if it is still in the tree.
  Prefix* child(Prefix* parent, int token) {
    if (Prefix* found = parent->extension(token)) return found;
    Prefix* prefix = parent->extensions = prefixes_.add({parent, token, parent->depth + 1, nullptr, parent->extensions});
    if (context_) {
      const ContextGraph::Move move = context_->advance(parent->state, token);
      prefix->state = move.state;
      prefix->earned = parent->earned + move.bonus;
      prefix->bonus = prefix->earned + context_->partial(move.state);
    }
    if (states_) {
      const FusionState::Move& move = states_->advance(*parent->language, token);
      prefix->language = move.state;
      prefix->spoken = parent->spoken + move.score;
      prefix->language_score = prefix->spoken + move.open;
    }
    if (grammar_) prefix->phrase = grammar_->advance(parent->phrase, token);
    prefix->extra = prefix->language_score + (ranking_ ? prefix->bonus : 0);
    return prefix;
  }

  // Free unneeded nodes once there are many.
  void collect() {
    if (peaks_.are_many()) {
      for (const Beam& beam : beams_) {
        for (Peak* peak : {beam.times, beam.blank_times, beam.token_times}) peaks_.need(peak);
      }
      peaks_.collect([](const Peak&) {});
    }
    if (!prefixes_.are_many()) return;
    for (const Beam& beam : beams_) prefixes_.need(beam.prefix);
    prefixes_.collect([this](Prefix& prefix) {
      for (Prefix** each = &prefix.extensions; *each;) {
        if (prefixes_.is_needed(*each)) each = &(*each)->next;
        else *each = (*each)->next;
      }
    });
  }

  std::size_t beam_size_;
  int blank_;
  const PhraseGraph* grammar_;
  int rest_;
  double rest_start_ = kNever;
  std::shared_ptr<const ContextGraph> context_;
  std::shared_ptr<FusionStates> states_;
  std::shared_ptr<const ContextGraph> ranking_;  // null if hotwords do not affect the ranking
  double most_bonus_, most_gain_;
  int num_frames_ = 0;
  Nodes<Prefix> prefixes_;
  Nodes<Peak> peaks_;
  std::vector<Beam> beams_, moved_, next_;  // `moved_`: results of `stay` by beam
  std::vector<Candidate> ranked_;
  std::vector<double> best_;
};

}  // namespace u2moe::runtime
