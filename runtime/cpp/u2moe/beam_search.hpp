// CTC prefix beam search, frame by frame. The results are those of the Python runtime (and of WeNet, with its ties).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "hotwords.hpp"

namespace u2moe {

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // instead of an index: greater than all

inline double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return b == kNever ? a : a + std::log1p(std::exp(b - a));
}

// Destroys a chain of nodes one by one: the stack would not hold the nested destructors of an hour without an endpoint.
template <class Node>
void destroy_chain(std::shared_ptr<Node> node, std::shared_ptr<Node> Node::*before) {
  while (node && node.use_count() == 1) node = std::move((*node).*before);
}

// A token sequence as a node of a tree. Equal sequences share one node while any beam needs it.
struct Prefix {
  std::shared_ptr<Prefix> parent;
  int token = -1;
  std::map<int, std::weak_ptr<Prefix>> children;
  std::size_t state = 0;  // of the hotwords, after it
  double earned = 0;      // bonus of complete hotwords
  double bonus = 0;       // the same and the share of an incomplete one, for ranking

  Prefix() = default;
  Prefix(const Prefix&) = delete;
  Prefix& operator=(const Prefix&) = delete;
  ~Prefix() { destroy_chain(std::move(parent), &Prefix::parent); }

  std::vector<int> tokens() const {
    std::vector<int> result;
    for (const Prefix* node = this; node->parent; node = node->parent.get()) result.push_back(node->token);
    std::reverse(result.begin(), result.end());
    return result;
  }
};

// Peaks of tokens as a linked list from the last one, shared by prefixes.
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

// A prefix and the log-probability of its alignments: of those that end in blank, of those that end in its last token, and of
// the single best one with its peaks.
struct Beam {
  std::shared_ptr<Prefix> prefix;
  double blank = kNever, token = kNever, total = kNever, best_blank = kNever, best_token = kNever;
  Peaks blank_times, token_times;
  std::size_t order = 0;

  double best() const { return std::max(best_token, best_blank); }
  const Peaks& times() const { return best_blank > best_token ? blank_times : token_times; }

  void add_blank(double score) {
    if (!(best_blank > best_token)) {
      best_blank = best_token;
      blank_times = token_times;
    }
    best_blank += score;
    blank = total = total + score;
    token = best_token = kNever;
    token_times = nullptr;
  }
};

// The best prefixes from frame to frame; `PrefixBeamSearch` runs one or two of these.
class BeamSearch {
 public:
  // `ranks_by_bonus`: prefixes are ranked by score plus bonus, and every extension is tried, because a bonus may lift it.
  BeamSearch(std::size_t beam_size, int blank, std::shared_ptr<const ContextGraph> context, bool ranks_by_bonus)
      : beam_size_(beam_size), blank_(blank), context_(std::move(context)), ranks_by_bonus_(ranks_by_bonus) {
    Beam root;
    root.prefix = std::make_shared<Prefix>();
    if (context_) root.prefix->state = context_->start();
    root.blank = root.total = root.best_blank = root.best_token = 0;
    beams_.push_back(std::move(root));
  }

  // Process one frame: its most probable tokens and their log-probabilities, in descending order.
  void advance(const std::vector<int>& tokens, const std::vector<double>& scores) {
    tokens_ = tokens;
    scores_ = scores;
    if (nothing_grows()) {
      stay_all();
    } else {
      grow_all();
    }
    ++num_frames_;
  }

  // Keep only the bonus of complete hotwords.
  void finish() {
    if (!context_) return;
    for (Beam& beam : beams_) beam.prefix->bonus = beam.prefix->earned + context_->finish(beam.prefix->state);
  }

  // Best first.
  const std::vector<Beam>& beams() const { return beams_; }

 private:
  // A beam that stays, or an extension.
  struct Candidate {
    double rank;  // what it is ranked by
    std::size_t order;
    std::size_t kept;  // index of a beam that stays, or kNone
    std::size_t parent, token;  // index of the beam that is extended, and of its new token
    double total;
  };

  // Whether blank is so probable that every prefix stays and none can enter the beam, as in most frames.
  bool nothing_grows() const {
    if (tokens_[0] != blank_ || beams_.size() < beam_size_ || ranks_by_bonus_) return false;
    const double grown = scores_.size() > 1 ? beams_[0].total + scores_[1] : kNever;
    return grown < beams_.back().total + scores_[0];
  }

  void stay_all() {
    std::vector<std::pair<std::size_t, Beam>> moved;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const std::size_t rank = rank_of(beams_[index].prefix->token);
      if (rank != kNone) moved.emplace_back(index, stay(index, index_of(beams_[index].prefix->parent), rank, 0));
    }
    for (Beam& beam : beams_) beam.add_blank(scores_[0]);
    for (auto& [index, beam] : moved) beams_[index] = std::move(beam);
    const auto better = [](const Beam& one, const Beam& other) { return one.total > other.total; };
    if (!moved.empty()) std::stable_sort(beams_.begin(), beams_.end(), better);
  }

  void grow_all() {
    const std::size_t width = 2 * beams_.size();
    const std::size_t blank_rank = rank_of(blank_);
    std::vector<Beam> kept;
    std::set<std::pair<std::size_t, std::size_t>> merged;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const std::size_t parent = index_of(beams_[index].prefix->parent), rank = rank_of(beams_[index].prefix->token);
      if (parent != kNone && rank != kNone) merged.emplace(parent, rank);
      Beam beam = stay(index, parent, rank, blank_rank);
      if (beam.total > kNever) kept.push_back(std::move(beam));
    }
    // Without a bonus, whatever is below this cannot be among the best. (Equal scores can: order decides.)
    double limit = kNever;
    std::vector<Candidate> candidates;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const double total = kept[i].total, bonus = ranks_by_bonus_ ? kept[i].prefix->bonus : 0;
      limit = i == 0 ? total : std::min(limit, total);
      candidates.push_back({total + bonus, kept[i].order, i, 0, 0, total});
    }
    if (kept.size() < beam_size_ || ranks_by_bonus_) limit = kNever;
    std::vector<std::shared_ptr<Prefix>> children;  // keeps those alive that may win
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& parent = beams_[index];
      for (std::size_t rank = 0; rank < tokens_.size() && parent.total + scores_[rank] >= limit; ++rank) {
        if (tokens_[rank] == blank_ || merged.count({index, rank})) continue;
        const double total = (tokens_[rank] == parent.prefix->token ? parent.blank : parent.total) + scores_[rank];
        if (!(total >= limit && total > kNever)) continue;
        if (ranks_by_bonus_) children.push_back(child(parent.prefix, tokens_[rank]));
        const double bonus = ranks_by_bonus_ ? children.back()->bonus : 0;
        candidates.push_back({total + bonus, rank * width + 2 * index + 1, kNone, index, rank, total});
      }
    }
    std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& one, const Candidate& other) {
      return one.rank != other.rank ? one.rank > other.rank : one.order < other.order;
    });
    candidates.resize(std::min(candidates.size(), beam_size_));
    std::vector<Beam> next;
    for (const Candidate& candidate : candidates) {
      next.push_back(candidate.kept != kNone ? std::move(kept[candidate.kept]) : grown(candidate));
    }
    beams_ = std::move(next);
  }

  Beam grown(const Candidate& candidate) const {
    Beam beam;
    const Beam& parent = beams_[candidate.parent];
    beam.prefix = child(parent.prefix, tokens_[candidate.token]);
    grow(beam, parent, scores_[candidate.token]);
    beam.total = candidate.total;
    beam.order = candidate.order;
    return beam;
  }

  // A prefix may leave the beam and return while longer ones survive: it is then the same node.
  std::shared_ptr<Prefix> child(const std::shared_ptr<Prefix>& parent, int token) const {
    std::weak_ptr<Prefix>& known = parent->children[token];
    if (std::shared_ptr<Prefix> found = known.lock()) return found;
    const auto prefix = std::make_shared<Prefix>();
    prefix->parent = parent;
    prefix->token = token;
    if (context_) {
      const ContextGraph::Move move = context_->advance(parent->state, token);
      prefix->state = move.state;
      prefix->earned = parent->earned + move.bonus;
      prefix->bonus = prefix->earned + context_->partial(move.state);
    }
    known = prefix;
    return prefix;
  }

  // Prefix `index` after this frame: its alignments add blank, repeat its last token, or extend those of its parent.
  Beam stay(std::size_t index, std::size_t parent, std::size_t rank, std::size_t blank_rank) const {
    const Beam& old = beams_[index];
    const std::size_t width = 2 * beams_.size();
    Beam beam;
    beam.prefix = old.prefix;
    beam.order = width * scores_.size();
    if (blank_rank != kNone) {
      beam.blank = old.total + scores_[blank_rank];
      beam.best_blank = old.best() + scores_[blank_rank];
      beam.blank_times = old.times();
      beam.order = blank_rank * width + 2 * index;
    }
    if (rank != kNone) {
      const double score = scores_[rank], repeats = old.best_token + score;
      if (parent < index) {
        grow(beam, beams_[parent], score);
        beam.order = std::min(beam.order, rank * width + 2 * parent + 1);
      }
      beam.token = log_add(beam.token, old.token + score);
      if (beam.best_token < repeats) {
        // The peak moves to this frame, unless the token was already reached from the parent in this frame.
        if (beam.best_token == kNever && old.token_times) {
          beam.token_times = std::make_shared<Peak>(old.token_times->before, num_frames_, score);
        }
        beam.best_token = repeats;
      }
      if (parent != kNone && parent > index) grow(beam, beams_[parent], score);
      beam.order = std::min(beam.order, rank * width + 2 * index);
    }
    beam.total = log_add(beam.blank, beam.token);
    return beam;
  }

  // Add to a beam the alignments of its parent extended by its token.
  void grow(Beam& beam, const Beam& parent, double score) const {
    const bool again = parent.prefix->token == beam.prefix->token;  // the same token again: only after a blank
    const double total = again ? parent.blank : parent.total, best = again ? parent.best_blank : parent.best();
    beam.token = log_add(beam.token, total + score);
    if (beam.best_token < best + score) {
      beam.best_token = best + score;
      beam.token_times = std::make_shared<Peak>(again ? parent.blank_times : parent.times(), num_frames_, score);
    }
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
  bool ranks_by_bonus_;
  int num_frames_ = 0;
  std::vector<Beam> beams_;
  std::vector<int> tokens_;
  std::vector<double> scores_;
};

}  // namespace u2moe
