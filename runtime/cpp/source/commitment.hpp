// Leading tokens that a beam search has committed to: every hypothesis that may still become the best begins with them.
// runtime/decoding/commitment.py explains why later frames cannot change these tokens.
#pragma once

#include "beam_search.hpp"

namespace u2moe::runtime {

/// Tokens that can be committed, and whether every possible next token begins a word.
struct Settled {
  std::vector<int> tokens;
  bool ends = false;
};

/// Committed tokens of a beam search. All later best hypotheses of the search begin with these tokens.
class Commitment {
 public:
  explicit Commitment(const BeamSearch& search) : last_(search.beams()[0].prefix) {}

  std::size_t num_tokens() const { return last_->depth; }

  bool holds_for(const Prefix& prefix) const { return prefix.ancestor(last_->depth) == last_; }

  /// Commit further settled tokens.
  void extend(const std::vector<int>& tokens) {
    Prefix* longer = extension(last_, tokens);
    for (Prefix* each = longer; each && each != last_; each = each->before) each->needed = Nodes<Prefix>::kAlways;
    if (longer) last_ = longer;
  }

  /// Earliest frame at which a token after the committed ones peaks in a hypothesis; `most` if there is none.
  int next_peak(const BeamSearch& search, int most) const {
    for (const Beam& beam : search.beams()) {
      if (holds_for(*beam.prefix)) most = std::min(most, beam.earliest_peak(num_tokens(), most));
    }
    return most;
  }

  /// Return twice the number of `tokens` that can be committed next, plus one if every possible next token begins a word.
  /// @param tokens tokens of the best hypothesis, after the committed ones.
  std::size_t num_settled(const BeamSearch& search, const std::vector<int>& tokens, const std::vector<unsigned char>& word_starts) const {
    Beams beams;
    std::map<const Prefix*, std::size_t> shared;
    std::size_t least_depth = search.beams()[0].prefix->depth;
    for (const Beam& beam : search.beams()) {
      beams[beam.prefix] = &beam;
      least_depth = std::min(least_depth, beam.prefix->depth);
      if (holds_for(*beam.prefix)) shared[beam.prefix] = num_shared(tokens, beam.prefix->tokens(num_tokens()), word_starts);
    }
    std::size_t settled = 2 * tokens.size();
    for (const auto& [prefix, own] : shared) {
      if (own >= settled) continue;
      const std::vector<const Beam*> line = line_of(prefix, beams, least_depth);
      std::size_t most = own;
      for (const auto& [rival, theirs] : shared) {
        if (theirs > most && beats(*beams.at(rival), line, beams)) most = theirs;
      }
      settled = std::min(settled, most);
    }
    return settled;
  }

 private:
  using Beams = std::map<const Prefix*, const Beam*>;

  static constexpr double kRounding = 1e-6;  // far above accumulated rounding errors

  static Prefix* extension(Prefix* prefix, const std::vector<int>& tokens) {
    for (std::size_t i = 0; prefix && i < tokens.size(); ++i) prefix = prefix->extension(tokens[i]);
    return prefix;
  }

  static std::size_t num_shared(const std::vector<int>& tokens, const std::vector<int>& others, const std::vector<unsigned char>& word_starts) {
    const std::size_t least = std::min(tokens.size(), others.size());
    std::size_t num = 0;
    while (num < least && tokens[num] == others[num]) ++num;
    const auto begins_word = [&](int token) { return word_starts[static_cast<std::size_t>(token)] != 0; };
    return 2 * num + (num < least && begins_word(tokens[num]) && begins_word(others[num]) ? 1 : 0);
  }

  // Beams of a prefix and of the shorter prefixes that it extends, shortest first.
  static std::vector<const Beam*> line_of(const Prefix* prefix, const Beams& beams, std::size_t least_depth) {
    std::vector<const Beam*> line;
    for (; prefix && prefix->depth >= least_depth; prefix = prefix->before) {
      if (const auto found = beams.find(prefix); found != beams.end()) line.push_back(found->second);
    }
    std::reverse(line.begin(), line.end());
    return line;
  }

  // Whether further tokens get the same scores after both prefixes.
  static bool has_same_future(const Prefix& one, const Prefix& other) {
    if (one.token != other.token || one.state != other.state || one.phrase != other.phrase || !one.language != !other.language) return false;
    return !one.language || (one.language->history == other.language->history && one.language->begun->letters == other.language->begun->letters);
  }

  static bool is_better(const Beam& beam, const Beam& other) {
    const double ahead = beam.prefix->extra - other.prefix->extra - kRounding;
    return beam.blank + ahead >= other.blank && beam.token + ahead >= other.token && beam.prefix->bonus >= other.prefix->bonus;
  }

  // Whether `rival` beats every beam of `line`, shortest first. For longer beams, `rival` is extended by the tokens they add.
  static bool beats(const Beam& rival, const std::vector<const Beam*>& line, const Beams& beams) {
    if (!has_same_future(*rival.prefix, *line[0]->prefix)) return false;
    Prefix* better = rival.prefix;
    std::size_t depth = line[0]->prefix->depth;
    for (const Beam* beam : line) {
      better = extension(better, beam->prefix->tokens(depth));
      const auto ours = beams.find(better);
      if (ours == beams.end() || !is_better(*ours->second, *beam)) return false;
      depth = beam->prefix->depth;
    }
    return true;
  }

  Prefix* last_;
};

}  // namespace u2moe::runtime
