// Hotwords: phrases that the search prefers. An Aho-Corasick automaton over text finds them, as in runtime/decoding/context.py.
#pragma once

#include "declared.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

/// A phrase to prefer, in any letter case.
struct Hotword {
  std::string phrase;
  double weight = kHotwordWeight;  ///< bonus for each token, as a log-probability
};

/// Parse lines of the form "phrase" or "phrase :weight". Comments ("# ...") and empty lines are skipped.
/// @throws InvalidArgument if a weight is not a number; the message names the line.
inline std::vector<Hotword> parse_hotwords(const std::string& content) {
  std::vector<Hotword> hotwords;
  const auto trimmed = [](std::string text) {
    text.erase(0, std::min(text.find_first_not_of(" \t\r"), text.size()));
    return text.erase(text.find_last_not_of(" \t\r") + 1);
  };
  int number = 0;
  for (const std::string& each : lines_of(content)) {
    const std::string line = trimmed(each);
    ++number;
    if (line.empty() || line[0] == '#') continue;
    const std::size_t colon = line.rfind(" :");
    Hotword& hotword = hotwords.emplace_back(Hotword{trimmed(line.substr(0, colon))});
    if (colon == std::string::npos) continue;
    const std::string weight = trimmed(line.substr(colon + 2));
    const auto value = parse_number(weight);
    if (!value) fail<InvalidArgument>("hotwords line " + std::to_string(number) + ": weight must be a number, got '" + weight + "'");
    hotword.weight = *value;
  }
  return hotwords;
}

/// The symbols of a vocabulary, as pieces from which words are spelled.
class Symbols {
 public:
  using Words = std::vector<std::u32string>;

  explicit Symbols(const Vocabulary& vocabulary) {
    for (const std::u32string& symbol : vocabulary.symbols()) {
      if (is_marker(symbol)) continue;
      if (!is_mark(symbol.front())) inner_.insert(symbol);
      first_.insert(stripped(symbol, is_mark));
    }
    first_.insert(inner_.begin(), inner_.end());
    for (const std::u32string& symbol : first_) {
      characters_.insert(symbol.begin(), symbol.end());
      longest_ = std::max(longest_, symbol.size());
    }
  }

  // Return the words of a text, spelled with the characters of the vocabulary. `what` describes the text in messages.
  template <class Kind>
  Words spelled(const std::u32string& text, bool (*is_word)(char32_t), const std::string& what) const {
    Words words(1);
    for (const char32_t c : with_boundaries(text, is_word)) {
      if (c == kWordBoundary) {
        if (!words.back().empty()) words.emplace_back();
        continue;
      }
      const char32_t forms[] = {c, upper(c), lower(c)};
      const auto form = std::find_if(std::begin(forms), std::end(forms), [&](char32_t each) { return characters_.count(each) > 0; });
      if (form == std::end(forms)) runtime::fail<Kind>(what + ": the vocabulary has no '" + encode_utf8({c}) + "'");
      words.back() += *form;
    }
    if (words.back().empty()) words.pop_back();
    for (const std::u32string& word : words) {
      if (fewest_tokens(word) == kImpossible) runtime::fail<Kind>(what + ": the vocabulary cannot spell '" + encode_utf8(word) + "'");
    }
    return words;
  }

  // Return the words of a phrase, spelled with the characters of the vocabulary, and the bonus of the phrase.
  std::pair<Words, double> measured(const Hotword& hotword) const {
    const std::u32string phrase = decode_utf8(hotword.phrase);
    const std::string name = "hotword '" + encode_utf8(phrase.substr(0, kLongestHotword)) + "'";
    const auto fail = [&](const std::string& what) { runtime::fail<InvalidArgument>(name + what); };
    if (phrase.size() > kLongestHotword) {
      fail("...: must have at most " + std::to_string(kLongestHotword) + " characters, got " + std::to_string(phrase.size()));
    }
    if (!(hotword.weight > 0 && hotword.weight <= kMostHotwordWeight)) {
      fail(": weight must be above 0 and at most " + shown_number(kMostHotwordWeight) + ", got " + shown_number(hotword.weight));
    }
    Words words = spelled<InvalidArgument>(phrase, is_syllabic, name);
    if (words.empty()) fail(" is empty");
    std::size_t num_tokens = 0;
    for (const std::u32string& word : words) num_tokens += fewest_tokens(word);
    return {words, hotword.weight * static_cast<double>(num_tokens)};
  }

 private:
  static constexpr std::size_t kImpossible = std::numeric_limits<std::size_t>::max() / 2;

  // Number of tokens in the shortest tokenization of a word.
  std::size_t fewest_tokens(const std::u32string& word) const {
    std::vector<std::size_t> fewest(word.size() + 1, kImpossible);
    fewest[0] = 0;
    for (std::size_t end = 1; end <= word.size(); ++end) {
      for (std::size_t begin = end - std::min(end, longest_); begin < end; ++begin) {
        if ((begin ? inner_ : first_).count(word.substr(begin, end - begin))) fewest[end] = std::min(fewest[end], fewest[begin] + 1);
      }
    }
    return std::min(fewest.back(), kImpossible);
  }

  std::set<std::u32string> inner_, first_;  // symbols that continue a word, and symbols that may begin a word
  std::set<char32_t> characters_;
  std::size_t longest_ = 0;
};

/// Gives a bonus to hypotheses that contain hotwords. Phrases match in any tokenization, but only as whole words. Each
/// character of a script without spaces, or of Korean, counts as a word. Immutable: threads may share it.
class ContextGraph {
 public:
  /// @param hotwords phrases. Of equal phrases, the one with the largest bonus counts.
  /// @throws InvalidArgument if the list or a phrase is empty, a weight is out of range, or the vocabulary cannot
  /// spell a phrase in upper or lower case.
  ContextGraph(const std::vector<Hotword>& hotwords, const Vocabulary& vocabulary) : fingerprint_(vocabulary.fingerprint()) {
    for (const std::u32string& symbol : vocabulary.symbols()) spellings_.push_back(with_boundaries(symbol, is_syllabic));
    states_.emplace_back();
    const Symbols symbols(vocabulary);
    std::map<Words, double> bonuses;
    for (const Hotword& hotword : hotwords) {
      const auto [words, bonus] = symbols.measured(hotword);
      double& most = bonuses[words];
      most = std::max(most, bonus);
    }
    if (bonuses.empty()) runtime::fail<InvalidArgument>("hotwords are empty: omit them to use none");
    for (const auto& [words, bonus] : bonuses) add_phrase(words, bonus);
    link();
    for (const State& state : states_) {
      for (const auto& [character, next] : state.next) {
        most_gain_ = std::max(most_gain_, states_[next].output + states_[next].partial - state.partial);
      }
    }
    std::size_t longest = 0;
    for (const std::u32string& spelling : spellings_) longest = std::max(longest, spelling.size());
    most_gain_ = most_gain_ * static_cast<double>(longest) + kRounding;
    start_ = states_[0].next.at(kWordBoundary);
  }

  struct Move {
    std::size_t state;
    double bonus;  ///< bonus of the phrases completed by this move
  };

  /// Whether the graph was made for this vocabulary.
  bool is_of(const Vocabulary& vocabulary) const { return fingerprint_ == vocabulary.fingerprint(); }
  std::size_t start() const { return start_; }  ///< state of an empty hypothesis

  /// Return the state after `token`, and the bonus of the phrases that `token` completes.
  Move advance(std::size_t state, int token) const { return read_on(state, spellings_[static_cast<std::size_t>(token)]); }

  /// Part of a bonus that a hypothesis receives for the beginning of a phrase, and loses unless it completes the phrase.
  double partial(std::size_t state) const { return states_[state].partial; }

  /// Upper bound on what a token adds to a hypothesis's bonus, including the bonus for beginnings of phrases; see `partial`.
  double most_gain() const { return most_gain_; }

  /// Bonus of the phrases that a hypothesis completes by ending in `state`.
  double finish(std::size_t state) const { return read_on(state, {kWordBoundary}).bonus; }

 private:
  using Words = Symbols::Words;
  static constexpr double kRounding = 1e-6;  // far above differences that come from the order of additions

  struct State {
    std::map<char32_t, std::size_t> next;
    double output = 0, partial = 0;
    std::size_t fail = 0;  // state of the longest proper suffix that begins a phrase
    bool is_after_boundary = false;
  };

  std::size_t grow(std::size_t state, char32_t character) {
    const auto [arc, is_new] = states_[state].next.emplace(character, states_.size());
    const std::size_t following = arc->second;
    if (is_new) states_.emplace_back().is_after_boundary = character == kWordBoundary;
    return following;
  }

  void add_phrase(const Words& words, double bonus) {
    std::size_t num_characters = 0, matched = 0, state = 0;
    for (const std::u32string& word : words) num_characters += word.size();
    for (const std::u32string& word : words) {
      state = grow(state, kWordBoundary);
      hold(state, bonus, matched, num_characters);
      for (const char32_t character : word) {
        state = grow(state, character);
        hold(state, bonus, ++matched, num_characters);
      }
    }
    states_[grow(state, kWordBoundary)].output = bonus;
  }

  void hold(std::size_t state, double bonus, std::size_t matched, std::size_t total) {
    states_[state].partial = std::max(states_[state].partial, bonus * static_cast<double>(matched) / static_cast<double>(total));
  }

  // Set the failure links. States also get the bonuses that their suffixes complete, and the largest `partial` of these.
  void link() {
    std::vector<std::size_t> queue;
    for (const auto& [character, state] : states_[0].next) queue.push_back(state);
    for (std::size_t place = 0; place < queue.size(); ++place) {
      State& state = states_[queue[place]];
      state.output += states_[state.fail].output;
      state.partial = std::max(state.partial, states_[state.fail].partial);
      for (const auto& [character, following] : state.next) {
        states_[following].fail = arc(state.fail, character);
        queue.push_back(following);
      }
    }
  }

  std::size_t arc(std::size_t state, char32_t character) const {
    for (;; state = states_[state].fail) {
      const auto found = states_[state].next.find(character);
      if (found != states_[state].next.end()) return found->second;
      if (state == 0) return 0;
    }
  }

  Move read_on(std::size_t state, const std::u32string& characters) const {
    double bonus = 0;
    for (const char32_t character : characters) {
      if (character == kWordBoundary && states_[state].is_after_boundary) continue;
      state = arc(state, character);
      bonus += states_[state].output;
    }
    return {state, bonus};
  }

  std::vector<std::u32string> spellings_;  // text of each token
  std::vector<State> states_;
  std::size_t start_ = 0, fingerprint_;
  double most_gain_ = 0;
};

}  // namespace u2moe::runtime
