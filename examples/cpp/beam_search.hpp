// CTC prefix beam search, frame by frame. The results are those of the Python runtime (and of WeNet, with its ties).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <vector>

namespace u2moe {

constexpr double kNever = -std::numeric_limits<double>::infinity();

inline double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return b == kNever ? a : a + std::log1p(std::exp(b - a));
}

// A token sequence as a node of a tree. Equal sequences share one node while any beam needs it.
struct Prefix {
  std::shared_ptr<Prefix> parent;
  int token = -1;
  std::map<int, std::weak_ptr<Prefix>> children;

  std::vector<int> tokens() const {
    std::vector<int> result;
    for (const Prefix* node = this; node->parent; node = node->parent.get()) result.push_back(node->token);
    std::reverse(result.begin(), result.end());
    return result;
  }
};

// Peaks of tokens as a linked list from the last one, shared by prefixes.
struct Peak {
  std::shared_ptr<const Peak> before;
  int frame;
  double score;
};
using Peaks = std::shared_ptr<const Peak>;

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

struct Hypothesis {
  std::vector<int> tokens;
  double score;
  std::vector<int> times;  // frames
  std::vector<double> probabilities;
};

class PrefixBeamSearch {
 public:
  PrefixBeamSearch(std::size_t beam_size, int blank) : beam_size_(beam_size), blank_(blank) {
    Beam root;
    root.prefix = std::make_shared<Prefix>();
    root.blank = root.total = root.best_blank = root.best_token = 0;
    beams_.push_back(root);
  }

  // Continue with log-probabilities [frames, vocab].
  void advance(const float* log_probs, std::size_t num_frames, std::size_t vocab_size) {
    for (std::size_t frame = 0; frame < num_frames; ++frame) advance_frame(log_probs + frame * vocab_size, vocab_size);
  }

  // Hypotheses so far, best first.
  std::vector<Hypothesis> hypotheses(std::size_t limit) const {
    std::vector<Hypothesis> found;
    for (std::size_t i = 0; i < std::min(limit, beams_.size()); ++i) {
      Hypothesis hypothesis{beams_[i].prefix->tokens(), beams_[i].total, {}, {}};
      for (const Peak* peak = beams_[i].times().get(); peak; peak = peak->before.get()) {
        hypothesis.times.push_back(peak->frame);
        hypothesis.probabilities.push_back(std::min(std::exp(peak->score), 1.0));
      }
      std::reverse(hypothesis.times.begin(), hypothesis.times.end());
      std::reverse(hypothesis.probabilities.begin(), hypothesis.probabilities.end());
      found.push_back(std::move(hypothesis));
    }
    return found;
  }

 private:
  struct Candidate {
    double score;
    std::size_t order;
    std::ptrdiff_t kept;  // index of a beam that stays, or -1
    std::size_t parent, rank;
  };

  void advance_frame(const float* log_probs, std::size_t vocab_size) {
    choose(log_probs, vocab_size);
    if (nothing_grows()) {
      stay_all();
    } else {
      grow_all();
    }
    ++num_frames_;
  }

  // The most probable tokens of a frame and their scores, most probable first, ties by id.
  void choose(const float* log_probs, std::size_t vocab_size) {
    const std::size_t num = std::min(beam_size_, vocab_size);
    tokens_.clear();
    for (std::size_t token = 0; token < vocab_size; ++token) {
      if (tokens_.size() == num && !(log_probs[token] > log_probs[tokens_.back()])) continue;
      if (tokens_.size() == num) tokens_.pop_back();
      auto place = tokens_.end();
      while (place != tokens_.begin() && log_probs[*(place - 1)] < log_probs[token]) --place;
      tokens_.insert(place, static_cast<int>(token));
    }
    scores_.assign(tokens_.size(), 0);
    for (std::size_t rank = 0; rank < tokens_.size(); ++rank) scores_[rank] = log_probs[tokens_[rank]];
  }

  // Whether blank is so probable that every prefix stays and none can enter the beam, as in most frames.
  bool nothing_grows() const {
    if (tokens_[0] != blank_ || beams_.size() < beam_size_) return false;
    const double grown = scores_.size() > 1 ? beams_[0].total + scores_[1] : kNever;
    return grown < beams_.back().total + scores_[0];
  }

  void stay_all() {
    std::vector<std::pair<std::size_t, Beam>> moved;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const std::ptrdiff_t rank = rank_of(beams_[index].prefix->token);
      if (rank >= 0) moved.emplace_back(index, stay(index, index_of(beams_[index].prefix->parent), rank, 0));
    }
    for (Beam& beam : beams_) beam.add_blank(scores_[0]);
    for (auto& [index, beam] : moved) beams_[index] = std::move(beam);
    const auto better = [](const Beam& one, const Beam& other) { return one.total > other.total; };
    if (!moved.empty()) std::stable_sort(beams_.begin(), beams_.end(), better);
  }

  void grow_all() {
    const std::size_t width = 2 * beams_.size();
    const std::ptrdiff_t blank_rank = rank_of(blank_);
    std::vector<Beam> kept;
    std::set<std::pair<std::size_t, std::size_t>> merged;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const std::ptrdiff_t parent = index_of(beams_[index].prefix->parent), rank = rank_of(beams_[index].prefix->token);
      if (parent >= 0 && rank >= 0) merged.emplace(parent, rank);
      Beam beam = stay(index, parent, rank, blank_rank);
      if (beam.total > kNever) kept.push_back(std::move(beam));
    }
    // Whatever is below this cannot be among the best. (Equal scores can: order decides.)
    double limit = kNever;
    std::vector<Candidate> candidates;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      limit = i == 0 ? kept[i].total : std::min(limit, kept[i].total);
      candidates.push_back({kept[i].total, kept[i].order, static_cast<std::ptrdiff_t>(i), 0, 0});
    }
    if (kept.size() < beam_size_) limit = kNever;
    for (std::size_t index = 0; index < beams_.size(); ++index) {
      const Beam& parent = beams_[index];
      for (std::size_t rank = 0; rank < tokens_.size() && parent.total + scores_[rank] >= limit; ++rank) {
        if (tokens_[rank] == blank_ || merged.count({index, rank})) continue;
        const double total = (tokens_[rank] == parent.prefix->token ? parent.blank : parent.total) + scores_[rank];
        if (total >= limit && total > kNever) candidates.push_back({total, rank * width + 2 * index + 1, -1, index, rank});
      }
    }
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& one, const Candidate& other) {
      return one.score != other.score ? one.score > other.score : one.order < other.order;
    });
    candidates.resize(std::min(candidates.size(), beam_size_));
    std::vector<Beam> next;
    for (const Candidate& candidate : candidates) {
      next.push_back(candidate.kept >= 0 ? std::move(kept[static_cast<std::size_t>(candidate.kept)]) : grown(candidate));
    }
    beams_ = std::move(next);
  }

  Beam grown(const Candidate& candidate) {
    Beam beam;
    const Beam& parent = beams_[candidate.parent];
    std::weak_ptr<Prefix>& child = parent.prefix->children[tokens_[candidate.rank]];
    beam.prefix = child.lock();
    if (!beam.prefix) {
      beam.prefix = std::make_shared<Prefix>();
      beam.prefix->parent = parent.prefix;
      beam.prefix->token = tokens_[candidate.rank];
      child = beam.prefix;
    }
    grow(beam, parent, scores_[candidate.rank]);
    beam.total = candidate.score;
    return beam;
  }

  // Prefix `index` after this frame: its alignments add blank, repeat its last token, or extend those of its parent.
  Beam stay(std::size_t index, std::ptrdiff_t parent, std::ptrdiff_t rank, std::ptrdiff_t blank_rank) const {
    const Beam& old = beams_[index];
    const std::size_t width = 2 * beams_.size();
    Beam beam;
    beam.prefix = old.prefix;
    beam.order = width * scores_.size();
    if (blank_rank >= 0) {
      beam.blank = old.total + scores_[blank_rank];
      beam.best_blank = old.best() + scores_[blank_rank];
      beam.blank_times = old.times();
      beam.order = blank_rank * width + 2 * index;
    }
    if (rank >= 0) {
      const double score = scores_[rank], repeats = old.best_token + score;
      if (parent >= 0 && parent < static_cast<std::ptrdiff_t>(index)) {
        grow(beam, beams_[parent], score);
        beam.order = std::min(beam.order, rank * width + 2 * static_cast<std::size_t>(parent) + 1);
      }
      beam.token = log_add(beam.token, old.token + score);
      if (beam.best_token < repeats) {
        // The peak moves to this frame, unless the token was already reached from the parent in this frame.
        if (beam.best_token == kNever && old.token_times) {
          beam.token_times = std::make_shared<const Peak>(Peak{old.token_times->before, num_frames_, score});
        }
        beam.best_token = repeats;
      }
      if (parent > static_cast<std::ptrdiff_t>(index)) grow(beam, beams_[parent], score);
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
      beam.token_times = std::make_shared<const Peak>(Peak{again ? parent.blank_times : parent.times(), num_frames_, score});
    }
  }

  std::ptrdiff_t rank_of(int token) const {
    const auto found = std::find(tokens_.begin(), tokens_.end(), token);
    return found == tokens_.end() ? -1 : found - tokens_.begin();
  }

  std::ptrdiff_t index_of(const std::shared_ptr<Prefix>& prefix) const {
    for (std::size_t index = 0; prefix && index < beams_.size(); ++index) {
      if (beams_[index].prefix == prefix) return static_cast<std::ptrdiff_t>(index);
    }
    return -1;
  }

  std::size_t beam_size_;
  int blank_;
  int num_frames_ = 0;
  std::vector<Beam> beams_;
  std::vector<int> tokens_;
  std::vector<double> scores_;
};

}  // namespace u2moe
