// CTC prefix beam search, frame by frame, with the score of a language model and the bonus of hotwords. The results are those
// of runtime/decoding/beam_search.py (and of WeNet, with its ties).
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <utility>
#include <vector>

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

  std::vector<int> tokens() const;
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
  void add_blank(double score);
};

/// The best prefixes from frame to frame; `PrefixBeamSearch` runs one or two of these.
class BeamSearch {
 public:
  /// @param states of the language model, or null.
  /// @param ranks_by_bonus prefixes are ranked with the bonus of hotwords.
  BeamSearch(std::size_t beam_size, int blank, std::shared_ptr<const ContextGraph> context, std::shared_ptr<FusionStates> states,
             bool ranks_by_bonus);

  /// Process one frame: its most probable tokens and their log-probabilities, in descending order.
  void advance(const std::vector<int>& tokens, const std::vector<double>& scores);

  /// Keep only the bonus of complete hotwords, and score the last word by the language model.
  void finish();

  /// Best first.
  const std::vector<Beam>& beams() const { return beams_; }

 private:
  // A prefix that stays, or its extension by a token: its index, and the rank of the token. The order is the point at which WeNet
  // would first meet it, which breaks ties.
  struct Candidate {
    double rank;
    std::size_t order, beam, token;
  };

  void extend(std::vector<Candidate>& ranked, const std::vector<std::pair<std::size_t, std::size_t>>& merged) const;
  Beam stay(std::size_t index, std::size_t parent, double score, double blank_score) const;
  Beam grown(const Candidate& candidate) const;
  void grow(Beam& beam, const Beam& parent, double score) const;
  double bonus(const Prefix& prefix, int token) const;
  std::shared_ptr<Prefix> child(const std::shared_ptr<Prefix>& parent, int token) const;
  std::size_t rank_of(int token) const;
  std::size_t index_of(const std::shared_ptr<Prefix>& prefix) const;

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
