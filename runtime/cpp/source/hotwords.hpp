// Hotwords: phrases that the search prefers, as an Aho-Corasick automaton over text; as runtime/decoding/context.py has them.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "vocabulary.hpp"

namespace u2moe::runtime {

/// A phrase to prefer, in any letter case.
struct Hotword {
  std::string phrase;
  double weight = 1.5;  ///< bonus for each token, as a log-probability; above 0 and at most 100
};

/// Hotwords from lines of "phrase" or "phrase :weight"; "# ..." and empty lines are skipped.
/// @throws InvalidArgument a weight is not a number; names the line.
std::vector<Hotword> parse_hotwords(const std::string& content);

/// The bonus that hotwords add to the score of a hypothesis. A phrase is found in any tokenization, but only as whole words;
/// each character of a script without spaces, and of Korean, counts as a word. Immutable: threads may share it.
class ContextGraph {
 public:
  /// @param hotwords of equal phrases the largest bonus counts.
  /// @throws InvalidArgument there are no hotwords, one is empty or cannot be spelled by the vocabulary in either letter
  /// case, or a weight is out of range.
  ContextGraph(const std::vector<Hotword>& hotwords, const Vocabulary& vocabulary);

  struct Move {
    std::size_t state;
    double bonus;  ///< of the phrases that were completed
  };

  /// Whether it was made for this vocabulary.
  bool is_of(const Vocabulary& vocabulary) const { return fingerprint_ == vocabulary.fingerprint(); }

  /// State of an empty hypothesis.
  std::size_t start() const { return start_; }

  /// Continue from `state` with a token.
  Move advance(std::size_t state, int token) const { return read_on(state, spellings_[static_cast<std::size_t>(token)]); }

  /// The share of a bonus that a growing hypothesis holds in `state`, and loses if the phrase is not completed.
  double partial(std::size_t state) const { return states_[state].partial; }

  /// Upper bound of what a token adds to the bonus of a growing hypothesis, its share included.
  double most_gain() const { return most_gain_; }

  /// The bonus of the phrases that are completed by ending in `state`.
  double finish(std::size_t state) const { return read_on(state, {kWordBoundary}).bonus; }

 private:
  using Words = std::vector<std::u32string>;

  struct State {
    std::map<char32_t, std::size_t> next;
    double output = 0, partial = 0;
    std::size_t fail = 0;  // the longest proper suffix that begins a phrase
    bool is_after_boundary = false;
  };

  std::size_t add_state();
  std::size_t grow(std::size_t state, char32_t character);
  void add_phrase(const Words& words, double bonus);
  void hold(std::size_t state, double bonus, std::size_t matched, std::size_t total);
  void link();
  std::size_t arc(std::size_t state, char32_t character) const;
  Move read_on(std::size_t state, const std::u32string& characters) const;

  std::vector<std::u32string> spellings_;  // what each token adds to the text
  std::vector<State> states_;
  std::size_t start_ = 0, fingerprint_;
  double most_gain_ = 0;
};

}  // namespace u2moe::runtime
