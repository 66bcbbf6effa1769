#include "beam_search.hpp"

#include <cmath>
#include <queue>

namespace u2moe::runtime {
namespace {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // instead of an index: greater than all

double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return b == kNever ? a : a + std::log1p(std::exp(b - a));
}

bool has(const std::vector<std::pair<std::size_t, std::size_t>>& pairs, std::size_t first, std::size_t second) {
  return std::find(pairs.begin(), pairs.end(), std::pair(first, second)) != pairs.end();
}

}  // namespace

std::vector<int> Prefix::tokens() const {
  std::vector<int> result;
  for (const Prefix* node = this; node->parent; node = node->parent.get()) result.push_back(node->token);
  std::reverse(result.begin(), result.end());
  return result;
}

void Beam::add_blank(double score) {
  if (!(best_blank > best_token)) {
    best_blank = best_token;
    blank_times = token_times;
  }
  best_blank += score;
  blank = total = total + score;
  rank = total + prefix->extra;
  token = best_token = kNever;
  token_times = nullptr;
}

BeamSearch::BeamSearch(std::size_t beam_size, int blank, std::shared_ptr<const ContextGraph> context, std::shared_ptr<FusionStates> states,
                       bool ranks_by_bonus)
    : beam_size_(beam_size), blank_(blank), context_(std::move(context)), states_(std::move(states)), ranking_(ranks_by_bonus ? context_ : nullptr),
      most_bonus_(ranking_ ? ranking_->most_gain() : 0), most_gain_(most_bonus_ + (states_ ? states_->fusion().most_gain() : 0)) {
  Beam root;
  root.prefix = std::make_shared<Prefix>();
  if (context_) root.prefix->state = context_->start();
  if (states_) root.prefix->language = states_->start();
  root.blank = root.total = root.rank = root.best_blank = root.best_token = 0;
  beams_.push_back(std::move(root));
}

void BeamSearch::advance(const std::vector<int>& tokens, const std::vector<double>& scores) {
  tokens_ = tokens;
  scores_ = scores;
  if (nothing_grows()) {
    stay_all();
  } else {
    grow_all();
  }
  ++num_frames_;
}

void BeamSearch::finish() {
  for (Beam& beam : beams_) {
    Prefix& prefix = *beam.prefix;
    if (context_) prefix.bonus = prefix.earned + context_->finish(prefix.state);
    if (states_ && prefix.parent) prefix.language_score = prefix.spoken + states_->finish(prefix.language);
  }
}

// Whether blank is so probable that every prefix stays and none can enter the beam, as in most frames.
bool BeamSearch::nothing_grows() const {
  if (tokens_[0] != blank_ || beams_.size() < beam_size_) return false;
  const double least = beams_.back().rank + scores_[0];
  if (scores_.size() < 2 || beams_[0].rank + scores_[1] + most_gain_ < least) return true;
  return states_ && !language_lets_grow(least - most_bonus_);
}

// Whether the bounds of the language model let an extension reach the score `least`; the first token is blank.
bool BeamSearch::language_lets_grow(double least) const {
  const Fusion& fusion = states_->fusion();
  for (const Beam& beam : beams_) {
    const double most = beam.rank + fusion.most_gain();
    if (most + scores_[1] < least) return false;
    const auto [going_on, ending] = states_->losses(*beam.prefix->language);
    for (std::size_t rank = 1; rank < tokens_.size() && most + scores_[rank] >= least; ++rank) {
      const int token = tokens_[rank];
      if (beam.rank + scores_[rank] + fusion.gain(token) + (fusion.ends_word(token) ? ending : going_on) >= least) return true;
    }
  }
  return false;
}

void BeamSearch::stay_all() {
  std::vector<std::pair<std::size_t, Beam>> moved;
  for (std::size_t index = 0; index < beams_.size(); ++index) {
    const std::size_t rank = rank_of(beams_[index].prefix->token);
    if (rank != kNone) moved.emplace_back(index, stay(index, index_of(beams_[index].prefix->parent), rank, 0));
  }
  for (Beam& beam : beams_) beam.add_blank(scores_[0]);
  for (auto& [index, beam] : moved) beams_[index] = std::move(beam);
  const auto better = [](const Beam& one, const Beam& other) { return one.rank > other.rank; };
  if (!moved.empty()) std::stable_sort(beams_.begin(), beams_.end(), better);
}

void BeamSearch::grow_all() {
  const std::size_t blank_rank = rank_of(blank_);
  std::vector<Beam> kept;
  std::vector<std::pair<std::size_t, std::size_t>> merged;  // extensions that are prefixes in the beam
  for (std::size_t index = 0; index < beams_.size(); ++index) {
    const std::size_t parent = index_of(beams_[index].prefix->parent), rank = rank_of(beams_[index].prefix->token);
    if (parent != kNone && rank != kNone) merged.emplace_back(parent, rank);
    Beam beam = stay(index, parent, rank, blank_rank);
    if (beam.total > kNever) kept.push_back(std::move(beam));
  }
  std::vector<Candidate> found = candidates(kept, merged);
  if (states_) found = scored(std::move(found), kept);
  prune(std::move(kept), found);
}

// Prefix `index` after this frame: its alignments add blank, repeat its last token, or extend those of its parent.
Beam BeamSearch::stay(std::size_t index, std::size_t parent, std::size_t rank, std::size_t blank_rank) const {
  const Beam& old = beams_[index];
  const std::size_t width = 2 * beams_.size();
  Beam beam;
  beam.prefix = old.prefix;
  beam.order = width * scores_.size();  // the point at which WeNet would first meet the prefix, which breaks ties
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
  beam.rank = beam.total + beam.prefix->extra;
  return beam;
}

// Add to a beam the alignments of its parent extended by its token.
void BeamSearch::grow(Beam& beam, const Beam& parent, double score) const {
  const bool again = parent.prefix->token == beam.prefix->token;  // the same token again: only after a blank
  const double total = again ? parent.blank : parent.total, best = again ? parent.best_blank : parent.best();
  beam.token = log_add(beam.token, total + score);
  if (beam.best_token < best + score) {
    beam.best_token = best + score;
    beam.token_times = std::make_shared<Peak>(again ? parent.blank_times : parent.times(), num_frames_, score);
  }
}

// Extensions that may be among the best; with a language model, `rank` is a bound.
std::vector<BeamSearch::Candidate> BeamSearch::candidates(const std::vector<Beam>& kept,
                                                          const std::vector<std::pair<std::size_t, std::size_t>>& merged) const {
  // Whatever is below this cannot be among the best. (Equal scores can: order decides.)
  double limit = kNever;
  if (kept.size() >= beam_size_) {
    limit = std::min_element(kept.begin(), kept.end(), [](const Beam& one, const Beam& other) { return one.rank < other.rank; })->rank;
  }
  const std::size_t width = 2 * beams_.size();
  std::vector<Candidate> found;
  for (std::size_t index = 0; index < beams_.size(); ++index) {
    const Beam& beam = beams_[index];
    const double most = beam.rank + most_gain_;
    for (std::size_t rank = 0; rank < tokens_.size() && most + scores_[rank] >= limit; ++rank) {
      const int token = tokens_[rank];
      if (token == blank_ || has(merged, index, rank)) continue;
      const double total = (token == beam.prefix->token ? beam.blank : beam.total) + scores_[rank];
      double score = ranking_ ? total + bonus(*beam.prefix, token) : total;
      if (states_) {
        const Fusion& fusion = states_->fusion();
        const auto [going_on, ending] = states_->losses(*beam.prefix->language);
        score += beam.prefix->language_score + fusion.gain(token) + (fusion.ends_word(token) ? ending : going_on);
      }
      if (score >= limit && total > kNever) found.push_back({score, rank * width + 2 * index + 1, index, rank, total});
    }
  }
  return found;
}

// Candidates with the score of the language model instead of its bound; without those that cannot win.
std::vector<BeamSearch::Candidate> BeamSearch::scored(std::vector<Candidate> candidates, const std::vector<Beam>& kept) const {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& one, const Candidate& other) {
    return one.rank != other.rank ? one.rank > other.rank : one.order < other.order;
  });
  std::vector<double> ranks(beam_size_, kNever);
  for (const Beam& beam : kept) ranks.push_back(beam.rank);
  std::sort(ranks.begin(), ranks.end(), std::greater<>());
  // The best so far, as many as the beam holds, the least on top.
  std::priority_queue<double, std::vector<double>, std::greater<>> best(ranks.begin(), ranks.begin() + static_cast<std::ptrdiff_t>(beam_size_));
  std::vector<Candidate> found;
  for (const Candidate& candidate : candidates) {
    if (candidate.rank < best.top()) break;
    const Prefix& prefix = *beams_[candidate.beam].prefix;
    const FusionState::Move move = states_->advance(prefix.language, tokens_[candidate.token]);
    const double added = prefix.spoken + move.score + move.state->open + bonus(prefix, tokens_[candidate.token]);
    const double score = candidate.total + added;
    if (score < best.top()) continue;
    best.pop();
    best.push(score);
    found.push_back(candidate);
    found.back().rank = score;
  }
  return found;
}

void BeamSearch::prune(std::vector<Beam> kept, const std::vector<Candidate>& candidates) {
  std::vector<Candidate> ranked;
  for (std::size_t i = 0; i < kept.size(); ++i) ranked.push_back({kept[i].rank, kept[i].order, i, kNone, kept[i].total});
  ranked.insert(ranked.end(), candidates.begin(), candidates.end());
  std::stable_sort(ranked.begin(), ranked.end(), [](const Candidate& one, const Candidate& other) {
    return one.rank != other.rank ? one.rank > other.rank : one.order < other.order;
  });
  ranked.resize(std::min(ranked.size(), beam_size_));
  std::vector<Beam> next;
  for (const Candidate& candidate : ranked) {
    if (candidate.token == kNone) {
      next.push_back(std::move(kept[candidate.beam]));
      continue;
    }
    const Beam& parent = beams_[candidate.beam];
    Beam beam;
    beam.prefix = child(parent.prefix, tokens_[candidate.token]);
    grow(beam, parent, scores_[candidate.token]);
    beam.order = candidate.order;
    beam.total = candidate.total;
    beam.rank = candidate.rank;
    next.push_back(std::move(beam));
  }
  beams_ = std::move(next);
}

// What hotwords add to the rank of a prefix extended by a token.
double BeamSearch::bonus(const Prefix& prefix, int token) const {
  if (!ranking_) return 0;
  const ContextGraph::Move move = ranking_->advance(prefix.state, token);
  return prefix.earned + move.bonus + ranking_->partial(move.state);
}

// A prefix may leave the beam and return while longer ones survive: it is then the same node.
std::shared_ptr<Prefix> BeamSearch::child(const std::shared_ptr<Prefix>& parent, int token) const {
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

std::size_t BeamSearch::rank_of(int token) const {
  const auto found = std::find(tokens_.begin(), tokens_.end(), token);
  return found == tokens_.end() ? kNone : static_cast<std::size_t>(found - tokens_.begin());
}

std::size_t BeamSearch::index_of(const std::shared_ptr<Prefix>& prefix) const {
  for (std::size_t index = 0; prefix && index < beams_.size(); ++index) {
    if (beams_[index].prefix == prefix) return index;
  }
  return kNone;
}

}  // namespace u2moe::runtime
