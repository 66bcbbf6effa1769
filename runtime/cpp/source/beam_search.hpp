// CTC prefix beam search, frame by frame, with the score of a language model and the bonus of hotwords. The results are those
// of runtime/decoding/beam_search.py (and of WeNet, with its ties).
#pragma once

#include "fusion.hpp"
#include "hotwords.hpp"

namespace u2moe::runtime {

constexpr double kNever = -std::numeric_limits<double>::infinity();

// Destroys a chain of nodes one by one: the stack would not hold the nested destructors of an hour without an endpoint.
template <class Node>
void destroy_chain(std::shared_ptr<Node> node, std::shared_ptr<Node> Node::*before) {
  while (node && node.use_count() == 1) node = std::move((*node).*before);
}

/// A token sequence as a node of a tree. Equal sequences share one node while any beam needs it.
struct Prefix {
  std::shared_ptr<Prefix> parent;
  int token = -1;
  std::size_t depth = 0;              ///< number of its tokens
  std::map<int, std::weak_ptr<Prefix>> children;
  std::size_t state = 0;              ///< of the hotwords, after it
  double earned = 0;                  ///< bonus of complete hotwords
  double bonus = 0;                   ///< the same and the share of an incomplete one
  FusionStatePtr language;            ///< state of the language model, after it
  double spoken = 0;                  ///< score of complete words
  double language_score = 0;          ///< the same and that of the best completion of the last one
  double extra = 0;                   ///< what the search adds to the log-probability of its alignments

  Prefix() = default;
  Prefix(const Prefix&) = delete;
  Prefix& operator=(const Prefix&) = delete;
  ~Prefix() { destroy_chain(std::move(parent), &Prefix::parent); }

  /// Token ids from the first, or from number `begin`, to the last.
  std::vector<int> tokens(std::size_t begin = 0) const {
    std::vector<int> result;
    for (const Prefix* node = this; node->depth > begin; node = node->parent.get()) result.push_back(node->token);
    std::reverse(result.begin(), result.end());
    return result;
  }

  /// The prefix of the first `length` tokens; null if there are fewer.
  const Prefix* ancestor(std::size_t length) const {
    const Prefix* node = this;
    while (node->depth > length) node = node->parent.get();
    return node->depth == length ? node : nullptr;
  }
};

/// Peaks of tokens as a linked list from the last one, shared by prefixes.
struct Peak {
  std::shared_ptr<Peak> before;
  int frame;
  double score;

  Peak(std::shared_ptr<Peak> earlier, int at, double log_prob) : before(std::move(earlier)), frame(at), score(log_prob) {}
  Peak(const Peak&) = delete;
  Peak& operator=(const Peak&) = delete;
  ~Peak() { destroy_chain(std::move(before), &Peak::before); }
};
using Peaks = std::shared_ptr<Peak>;

/// A prefix and the log-probability of its alignments: of those that end in blank, of those that end in its last token, of
/// both, and of the single best one of each kind and of both, with its peaks. `rank` is the total and what the search adds.
struct Beam {
  std::shared_ptr<Prefix> prefix;
  double blank = kNever, token = kNever, total = kNever, rank = kNever;
  double best = kNever, best_blank = kNever, best_token = kNever;
  Peaks times, blank_times, token_times;

  double score() const { return total + prefix->bonus + prefix->language_score; }

  /// Earliest frame at which token `number` peaks in its alignments; `most` if there is no such token.
  int earliest_peak(std::size_t number, int most) const {
    if (number >= prefix->depth) return most;
    for (const Peaks& last : {blank_times, token_times}) {
      const Peak* peak = last.get();
      for (std::size_t place = prefix->depth - 1; peak && place > number; --place) peak = peak->before.get();
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

/// The best prefixes from frame to frame; `PrefixBeamSearch` runs one or two of these.
class BeamSearch {
 public:
  /// @param states of the language model, or null.
  /// @param ranks_by_bonus prefixes are ranked with the bonus of hotwords.
  BeamSearch(std::size_t beam_size, int blank, std::shared_ptr<const ContextGraph> context, std::shared_ptr<FusionStates> states,
                         bool ranks_by_bonus)
      : beam_size_(beam_size), blank_(blank), context_(std::move(context)), states_(std::move(states)), ranking_(ranks_by_bonus ? context_ : nullptr),
        most_bonus_(ranking_ ? ranking_->most_gain() : 0), most_gain_(most_bonus_ + (states_ ? states_->fusion().most_gain() : 0)) {
    Beam root;
    root.prefix = std::make_shared<Prefix>();
    if (context_) root.prefix->state = context_->start();
    if (states_) root.prefix->language = states_->start();
    root.blank = root.total = root.rank = root.best = root.best_blank = root.best_token = 0;
    beams_.push_back(std::move(root));
  }

  /// Process one frame: its most probable tokens and their log-probabilities, in descending order.
  void advance(const std::vector<int>& tokens, const std::vector<double>& scores) {
    tokens_ = tokens;
    scores_ = scores;
    const std::size_t blank_rank = std::min(rank_of(blank_), tokens.size()), width = 2 * beams_.size();
    const double blank_score = blank_rank < tokens.size() ? scores[blank_rank] : kNever;
    std::vector<Beam> moved(beams_.size());  // those that do more than add blank
    std::vector<std::pair<std::size_t, std::size_t>> merged;  // extensions that are prefixes in the beam
    std::vector<Candidate> ranked;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& beam = beams_[index];
      const std::size_t rank = rank_of(beam.prefix->token);
      std::size_t order = blank_rank * width + 2 * index;
      double total = beam.total + blank_score;
      if (rank != kNone) {
        const std::size_t parent = index_of(beam.prefix->parent);
        order = std::min(order, rank * width + 2 * index);
        if (parent != kNone) {
          merged.emplace_back(parent, rank);
          order = std::min(order, rank * width + 2 * parent + 1);
        }
        if (parent != kNone || beam.token > kNever) {
          moved[index] = stay(index, parent, scores[rank], blank_score);
          total = moved[index].total;
        }
      }
      if (total > kNever) ranked.push_back({total + beam.prefix->extra, order, index, kNone});
    }
    extend(ranked, merged);
    std::sort(ranked.begin(), ranked.end(), [](const Candidate& one, const Candidate& other) {
      return one.rank != other.rank ? one.rank > other.rank : one.order < other.order;
    });
    ranked.resize(std::min(ranked.size(), beam_size_));
    std::vector<Beam> next(ranked.size());
    for (std::size_t i = 0; i < ranked.size(); ++i) {
      if (ranked[i].token != kNone) next[i] = grown(ranked[i]);
    }
    for (std::size_t i = 0; i < ranked.size(); ++i) {  // only now may the beams before this frame change
      if (ranked[i].token != kNone) continue;
      const std::size_t index = ranked[i].beam;
      if (moved[index].prefix) {
        next[i] = std::move(moved[index]);
      } else {
        next[i] = std::move(beams_[index]);
        next[i].add_blank(blank_score);
      }
    }
    beams_ = std::move(next);
    ++num_frames_;
  }

  /// Keep only the bonus of complete hotwords, and score the last word by the language model.
  void finish() {
    for (Beam& beam : beams_) {
      Prefix& prefix = *beam.prefix;
      if (context_) prefix.bonus = prefix.earned + context_->finish(prefix.state);
      if (states_ && prefix.parent) prefix.language_score = prefix.spoken + states_->finish(prefix.language);
    }
  }

  /// Best first.
  const std::vector<Beam>& beams() const { return beams_; }

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // instead of an index: greater than all

  static double log_add(double a, double b) {
    if (a < b) std::swap(a, b);
    return b == kNever ? a : a + std::log1p(std::exp(b - a));
  }

  static bool has(const std::vector<std::pair<std::size_t, std::size_t>>& pairs, std::size_t first, std::size_t second) {
    return std::find(pairs.begin(), pairs.end(), std::pair(first, second)) != pairs.end();
  }

  // A prefix that stays, or its extension by a token: its index, and the rank of the token. The order is the point at which WeNet
  // would first meet it, which breaks ties.
  struct Candidate {
    double rank;
    std::size_t order, beam, token;
  };

  // Extensions that may be among the best, beside the prefixes that stay.
  void extend(std::vector<Candidate>& ranked, const std::vector<std::pair<std::size_t, std::size_t>>& merged) const {
    std::vector<double> ranks(beam_size_, kNever);
    for (const Candidate& stays : ranked) ranks.push_back(stays.rank);
    std::sort(ranks.begin(), ranks.end(), std::greater<>());
    // The best so far, the least on top: what is below it is not among the best. (What equals it may be: the order decides.)
    std::priority_queue<double, std::vector<double>, std::greater<>> best(ranks.begin(), ranks.begin() + static_cast<std::ptrdiff_t>(beam_size_));
    const std::size_t width = 2 * beams_.size();
    const auto likely = std::find_if(tokens_.begin(), tokens_.end(), [&](int token) { return token != blank_; }) - tokens_.begin();
    const auto first = static_cast<std::size_t>(likely);
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& beam = beams_[index];
      const Prefix& prefix = *beam.prefix;
      if (first == tokens_.size() || beam.rank + most_gain_ + scores_[first] < best.top()) break;  // and so are those that follow
      const FusionState::Losses losses = states_ ? states_->losses(*prefix.language) : FusionState::Losses{};
      const double most = beam.rank + losses.most + most_bonus_;
      for (std::size_t rank = first; rank < tokens_.size() && most + scores_[rank] >= best.top(); ++rank) {
        const int token = tokens_[rank];
        if (token == blank_ || has(merged, index, rank)) continue;
        const double total = (token == prefix.token ? beam.blank : beam.total) + scores_[rank];
        double score = ranking_ ? total + bonus(prefix, token) : total;
        if (states_) {
          const Fusion& fusion = states_->fusion();
          const double loss = fusion.ends_word(token) ? losses.ending : losses.going_on;
          if (score + (prefix.language_score + fusion.gain(token) + loss) < best.top()) continue;
          const FusionState::Move move = states_->advance(prefix.language, token);
          score = total + (prefix.spoken + move.score + move.state->open + bonus(prefix, token));
        }
        if (score < best.top() || total == kNever) continue;
        best.pop();
        best.push(score);
        ranked.push_back({score, rank * width + 2 * index + 1, index, rank});
      }
    }
  }

  // Prefix `index` after a frame that has its last token among the likely ones: its alignments add blank, repeat that token, or
  // extend those of its parent.
  Beam stay(std::size_t index, std::size_t parent, double score, double blank_score) const {
    const Beam& old = beams_[index];
    Beam beam;
    beam.prefix = old.prefix;
    beam.blank = old.total + blank_score;
    beam.token = old.token + score;
    beam.best_blank = old.best + blank_score;
    beam.blank_times = old.times;
    if (parent < index) grow(beam, beams_[parent], score);
    const double repeats = old.best_token + score;
    if (beam.best_token < repeats) {
      // The peak moves to this frame, unless the token was already reached from the parent in this frame.
      if (beam.best_token == kNever && old.token_times) {
        beam.token_times = std::make_shared<Peak>(old.token_times->before, num_frames_, score);
      }
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

  // A prefix extended by a token.
  Beam grown(const Candidate& candidate) const {
    const Beam& parent = beams_[candidate.beam];
    Beam beam;
    beam.prefix = child(parent.prefix, tokens_[candidate.token]);
    grow(beam, parent, scores_[candidate.token]);
    beam.total = beam.token;
    beam.rank = candidate.rank;
    beam.best = beam.best_token;
    beam.times = beam.token_times;
    return beam;
  }

  // Add to a beam the alignments of its parent extended by its token.
  void grow(Beam& beam, const Beam& parent, double score) const {
    const bool again = parent.prefix->token == beam.prefix->token;  // the same token again: only after a blank
    const double total = again ? parent.blank : parent.total, best = again ? parent.best_blank : parent.best;
    beam.token = log_add(beam.token, total + score);
    if (beam.best_token < best + score) {
      beam.best_token = best + score;
      beam.token_times = std::make_shared<Peak>(again ? parent.blank_times : parent.times, num_frames_, score);
    }
  }

  // What hotwords add to the rank of a prefix extended by a token.
  double bonus(const Prefix& prefix, int token) const {
    if (!ranking_) return 0;
    const ContextGraph::Move move = ranking_->advance(prefix.state, token);
    return prefix.earned + move.bonus + ranking_->partial(move.state);
  }

  // A prefix may leave the beam and return while longer ones survive: it is then the same node.
  std::shared_ptr<Prefix> child(const std::shared_ptr<Prefix>& parent, int token) const {
    std::weak_ptr<Prefix>& known = parent->children[token];
    if (std::shared_ptr<Prefix> found = known.lock()) return found;
    const auto prefix = std::make_shared<Prefix>();
    prefix->parent = parent;
    prefix->token = token;
    prefix->depth = parent->depth + 1;
    if (context_) {
      const ContextGraph::Move move = context_->advance(parent->state, token);
      prefix->state = move.state;
      prefix->earned = parent->earned + move.bonus;
      prefix->bonus = prefix->earned + context_->partial(move.state);
    }
    if (states_) {
      const FusionState::Move move = states_->advance(parent->language, token);
      prefix->language = move.state;
      prefix->spoken = parent->spoken + move.score;
      prefix->language_score = prefix->spoken + move.state->open;
    }
    prefix->extra = prefix->language_score + (ranking_ ? prefix->bonus : 0);
    known = prefix;
    return prefix;
  }

  std::size_t rank_of(int token) const {
    const auto found = std::find(tokens_.begin(), tokens_.end(), token);
    return found == tokens_.end() ? kNone : static_cast<std::size_t>(found - tokens_.begin());
  }

  std::size_t index_of(const std::shared_ptr<Prefix>& prefix) const {
    for (std::size_t index = 0; prefix && index < beams_.size(); ++index) {
      if (beams_[index].prefix == prefix) return index;
    }
    return kNone;
  }

  std::size_t beam_size_;
  int blank_;
  std::shared_ptr<const ContextGraph> context_;
  std::shared_ptr<FusionStates> states_;
  std::shared_ptr<const ContextGraph> ranking_;  // null if prefixes are ranked without hotwords
  double most_bonus_, most_gain_;
  int num_frames_ = 0;
  std::vector<Beam> beams_;
  std::vector<int> tokens_;
  std::vector<double> scores_;
};

}  // namespace u2moe::runtime
