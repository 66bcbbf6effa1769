// Automata over characters for grammars, as in runtime/text/grammar.py and runtime/decoding/phrases.py.
#pragma once

#include "hotwords.hpp"
#include "likely_tokens.hpp"

namespace u2moe::runtime {

/// State of a hypothesis in a grammar.
struct PhraseState {
  std::u32string places = {};  ///< sorted places in phrases that the last characters may have reached; a few fit a string without allocation
  bool is_apart = false;       ///< the hypothesis ends in a word boundary
  bool accepts = false;        ///< the hypothesis may end here: after a complete phrase, or before the first
  std::uint64_t next = 0;      ///< bits of the characters that may follow; see `bit_of`

  bool operator!=(const PhraseState& other) const {
    return std::tie(places, is_apart, accepts) != std::tie(other.places, other.is_apart, other.accepts);
  }
};

/// Automaton of a grammar for a vocabulary. States are made deterministic when a search reaches them.
class PhraseGraph {
 public:
  /// @param lines the lines of the grammar; see u2moe_stream_options.
  /// @throws GrammarError if a line has invalid syntax, a slot is undefined or contains itself, or a phrase may be empty. It is
  /// also thrown if a phrase has characters that the vocabulary lacks, or if the grammar has no phrases or is too large.
  PhraseGraph(const std::vector<std::string>& lines, const Vocabulary& vocabulary, int blank)
      : vocabulary_(vocabulary), symbols_(vocabulary) {
    const std::vector<Phrase> phrases = read(lines);
    if (phrases.empty()) fail("found no phrase, expected at least one");
    for (const std::u32string& symbol : vocabulary.symbols()) spellings_.push_back(with_boundaries(symbol, is_spaceless));
    add_place(true);
    for (const Phrase& phrase : phrases) {
      const Places ends = ends_of(phrase.parts, kRoot, {}, phrase.name);
      if (ends[0] == 0) fail(phrase.name + ": can be empty, expected at least one word");
      for (const std::size_t end : ends) is_end_[end] = true;
    }
    find_tokens(static_cast<std::size_t>(blank));
  }

  /// The vocabulary, with an additional token if the grammar allows other words.
  const Vocabulary& vocabulary() const { return vocabulary_; }
  int rest() const { return rest_; }  ///< token for other words; negative: other words are not allowed

  /// Whether the last word is complete, whatever token follows.
  bool is_whole(const PhraseState& state) const {
    const auto is_over = [this](std::size_t place) { return arcs_[place].empty() || (arcs_[place][0].first == kWordBoundary && arcs_[place].back().first == kWordBoundary); };
    return state.accepts && (state.is_apart || std::all_of(state.places.begin(), state.places.end(), is_over));
  }

  PhraseState start() const { return state(after(kRoot, kWordBoundary), true, true); }  ///< state of an empty hypothesis

  /// Whether `token` may follow.
  bool allows(const PhraseState& from, int token) const {
    if (token == rest_) return from.accepts && from.places != kRoot;
    PhraseState to;
    return (from.next & heads_[static_cast<std::size_t>(token)][from.is_apart]) != 0 && reach(from, token, to);
  }

  /// State after a token for which `allows` is true.
  PhraseState advance(const PhraseState& from, int token) const {
    if (token == rest_) return state(kRoot, false, true);
    PhraseState to;
    reach(from, token, to);
    return state(to.places, to.is_apart, to.accepts);
  }

  /// Find the most probable tokens of a row [vocab] among the tokens that occur in the grammar. Return the log-probability of
  /// `rest` at the start of a word. `allowed` is scratch memory.
  double find(const float* row, std::size_t beam_size, std::vector<float>& allowed, LikelyTokens& likely) const {
    float start = -kAny;
    allowed.resize(vocabulary_.size());
    for (std::size_t token = 0; token < parts_.size(); ++token) allowed[token] = row[token] < parts_[token] ? row[token] : parts_[token];
    if (rest_ >= 0) {
      allowed.back() = most(row, words_) - kRestPenalty;
      start = most(row, starts_) - kRestPenalty;
    }
    likely.find(allowed.data(), allowed.size(), std::min(std::max(beam_size, kMinGrammarTokens), num_tokens_));
    return static_cast<double>(start);
  }

  /// For tokens that the grammar allows, return the start and end of each complete phrase. Where several phrases match, the
  /// longest counts. Unless the tokens are final, exclude a last phrase that may still grow.
  std::vector<std::pair<std::size_t, std::size_t>> phrases(const std::vector<int>& tokens, bool is_final) const {
    const std::size_t num = tokens.size();
    std::vector<std::pair<bool, std::size_t>> following(num + 1, {false, kNone});  // whether a phrase may begin, and its end
    following[num].first = true;
    for (std::size_t begin = num; begin-- > 0;) {
      const std::pair<std::vector<std::size_t>, bool> read = ends_in(tokens, begin);
      const auto is_possible = [&](std::size_t end) { return following[end].first && (is_final || !read.second || end < num); };
      const auto end = std::find_if(read.first.rbegin(), read.first.rend(), is_possible);
      const bool has_end = end != read.first.rend();
      following[begin] = {read.second || has_end, has_end ? *end : kNone};
    }
    std::vector<std::pair<std::size_t, std::size_t>> found;
    for (std::size_t begin = 0, end; (end = following[begin].second) != kNone; begin = end) {
      if (!is_between(tokens[begin])) found.emplace_back(begin, end);
    }
    return found;
  }

 private:
  using Places = std::u32string;
  using Arcs = std::vector<std::pair<char32_t, char32_t>>;  // sorted characters with the place that each leads to
  using Parts = std::vector<std::u32string>;  // words, slots, brackets and |
  struct Phrase {
    std::string name;  // for messages
    Parts parts;
  };
  static constexpr std::size_t kMostNested = 100;

  [[noreturn]] static void fail(const std::string& what) { runtime::fail<GrammarError>("grammar: " + what); }

  // ---- Lines ----

  std::vector<Phrase> read(const std::vector<std::string>& lines) {
    std::vector<Phrase> phrases;
    for (const std::string& line : lines) {
      const std::u32string text = stripped(decode_utf8(line), is_space), quoted = U"'" + decode_utf8(line) + U"'";
      const std::string shown = encode_utf8(quoted.substr(0, 80));
      if (quoted.size() - 2 > kLongestGrammarLine) {
        runtime::fail<GrammarError>("grammar must be a list of phrases of at most " + std::to_string(kLongestGrammarLine) + " characters, got " + shown);
      }
      if (text == kUnknown) {
        if (rest_ < 0) rest_ = vocabulary_.add(kWordBoundary + (kUnknown + std::u32string(1, kWordBoundary)));
        continue;
      }
      const std::size_t end = text.find_first_of(U"<>=|", 1), sign = end == std::u32string::npos ? end : text.find_first_not_of(U" \t", end + 1);
      const bool is_slot = text.size() > 2 && text[0] == U'<' && end > 1 && sign < text.size() && text[end] == U'>' && text[sign] == U'=';
      const std::u32string slot = is_slot ? text.substr(0, end + 1) : U"";
      Phrase phrase{is_slot ? "slot " + encode_utf8(slot) : "phrase " + shown, {}};
      if (is_slot && this->slot(slot)) fail(phrase.name + ": found two definitions, expected one");
      phrase.parts = divided(is_slot ? text.substr(sign + 1) : text, phrase.name);
      ends_of(phrase.parts, {}, {}, phrase.name);
      if (is_slot) slots_.emplace_back(slot, std::move(phrase.parts));
      else phrases.push_back(std::move(phrase));
    }
    return phrases;
  }

  static Parts divided(const std::u32string& text, const std::string& what) {
    static const std::u32string signs = U"()[]|<>";
    Parts parts;
    for (std::size_t place = 0, end; place < text.size(); place = end) {
      const char32_t first = text[place];
      end = place + 1;
      if (is_space(first)) continue;
      const std::size_t close = first == U'<' ? text.find_first_of(U"<>", end) : place;
      if (first == U'>' || close >= text.size() || (first == U'<' && text[close] == U'<')) {
        fail(what + ": found '" + encode_utf8({first}) + "', expected words, (), [], | or <slot>");
      }
      if (first == U'<') end = close + 1;
      else if (text.compare(place, kUnknown.size(), kUnknown) == 0) end = place + kUnknown.size();
      else if (signs.find(first) == std::u32string::npos) while (end < text.size() && !is_space(text[end]) && signs.find(text[end]) == std::u32string::npos) ++end;
      parts.push_back(text.substr(place, end - place));
    }
    return parts;
  }

  const Parts* slot(const std::u32string& name) const {
    const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const auto& each) { return each.first == name; });
    return found == slots_.end() ? nullptr : &found->second;
  }

  // ---- The automaton ----

  // Return the places where a phrase or slot that begins at `places` may end. `within` lists the slots and brackets around it.
  // If `places` is empty, only check the syntax.
  Places ends_of(const Parts& parts, const Places& places, const Parts& within, const std::string& what) {
    std::size_t place = 0;
    return ends_of(parts, place, U"", places, within, what);
  }

  Places ends_of(const Parts& parts, std::size_t& place, const std::u32string& closing, const Places& places, Parts within, const std::string& what) {
    if (within.size() > kMostNested) {
      const std::string most = std::to_string(kMostNested);
      fail(what + ": found more than " + most + " nested brackets or slots, expected at most " + most);
    }
    const std::string close = "'" + encode_utf8(closing) + "'";
    Places ends, reached = places;
    bool is_empty = true, has_empty = false, is_open = !closing.empty();
    while (place < parts.size()) {
      const std::u32string& part = parts[place++];
      if (part == closing) {
        is_open = false;
        break;
      }
      if (part == U"|") {
        join(ends, std::exchange(reached, places));
        has_empty |= std::exchange(is_empty, true);
        continue;
      }
      is_empty = false;
      if (!places.empty() && part != U")" && part != U"]") count(1, what);
      if (part == U"(" || part == U"[") {
        within.emplace_back();
        Places after = ends_of(parts, place, part == U"(" ? U")" : U"]", reached, within, what);
        within.pop_back();
        if (part == U"[") join(after, reached);
        reached = std::move(after);
      } else if (part == U")" || part == U"]" || part == kUnknown) {
        const std::string expected = closing.empty() ? "words" : close + " or words";
        fail(what + ": found '" + encode_utf8(part) + "', expected " +
             (part == kUnknown ? "[unk] on a line of its own" : expected));
      } else if (!places.empty()) {
        reached = part[0] == U'<' ? ends_of_slot(part, reached, within, what) : add_words(part, std::move(reached), what);
      }
    }
    if (is_open) fail(what + ": found the end, expected " + close);
    if (is_empty || has_empty) fail(what + ": found nothing, expected words");
    join(ends, reached);
    return ends;
  }

  Places ends_of_slot(const std::u32string& name, const Places& places, Parts within, const std::string& what) {
    const std::string shown = "slot " + encode_utf8(name);
    if (std::find(within.begin(), within.end(), name) != within.end()) fail(what + ": " + shown + " contains itself");
    const Parts* const parts = slot(name);
    if (!parts) {
      const std::string names = joined(slots_, ", ", [](const auto& each) { return encode_utf8(each.first); });
      fail(what + ": found " + shown + ", expected " + (slots_.empty() ? "none: the grammar defines none" : "one of " + names));
    }
    within.push_back(name);
    return ends_of(*parts, places, within, what);
  }

  static void join(Places& places, const Places& others) {
    places.insert(places.end(), others.begin(), others.end());
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
  }

  void count(std::size_t number, const std::string& what) {
    num_steps_ += number;
    if (num_steps_ <= kMostSteps && arcs_.size() < kMostPlaces) return;
    fail(what + ": found " + std::to_string(arcs_.size()) + " characters, " + std::to_string(num_steps_) + " steps, expected fewer");
  }

  void add_place(bool is_single) {
    arcs_.emplace_back();
    is_single_.push_back(is_single);
    is_end_.push_back(false);
  }

  Places add_words(const std::u32string& text, Places places, const std::string& what) {
    for (const std::u32string& word : symbols_.spelled<GrammarError>(text, is_spaceless, "grammar: " + what)) {
      words_of_phrases_.insert(word);
      for (const char32_t character : kWordBoundary + word) {
        count(places.size(), what);
        const auto [first, last] = arcs(places[0], character);
        const auto single = std::find_if(first, last, [&](const auto& arc) { return places.size() == 1 && is_single_[arc.second]; });
        auto next = static_cast<char32_t>(arcs_.size());
        if (single != last) {
          next = single->second;
        } else {
          for (const std::size_t each : places) arcs_[each].insert(arcs(each, character).second, {character, next});
          add_place(places.size() == 1);
        }
        places.assign(1, next);
      }
    }
    return places;
  }

  std::pair<Arcs::const_iterator, Arcs::const_iterator> arcs(std::size_t place, char32_t character) const {
    const auto first = std::lower_bound(arcs_[place].begin(), arcs_[place].end(), std::pair(character, char32_t{0}));
    return {first, std::upper_bound(first, arcs_[place].end(), std::pair(character, std::numeric_limits<char32_t>::max()))};
  }

  Places after(const Places& places, char32_t character) const {
    Places found;
    for (const std::size_t place : places) {
      const auto [first, last] = arcs(place, character);
      std::for_each(first, last, [&](const auto& arc) { found += arc.second; });
    }
    if (found.size() > 1) join(found, {});
    return found;
  }

  // Make `to` the state after a token other than `rest`. Return whether the token may follow.
  bool reach(const PhraseState& from, int token, PhraseState& to) const {
    to.is_apart = from.is_apart;
    to.accepts = from.accepts;
    const Places* places = &from.places;
    for (const char32_t character : spellings_[static_cast<std::size_t>(token)]) {
      const bool is_boundary = character == kWordBoundary;
      if (is_boundary && to.is_apart) continue;
      to.places = after(*places, character);
      if (to.places.empty()) return false;
      const bool is_complete = has_end(to.places);
      if (is_complete) to.places.insert(0, kRoot);
      to.accepts = is_complete || (is_boundary && to.accepts);
      to.is_apart = is_boundary;
      places = &to.places;
    }
    if (places == &from.places) to.places = from.places;
    return true;
  }

  PhraseState state(const Places& places, bool is_apart, bool accepts) const {
    std::uint64_t next = 0;
    for (const std::size_t place : places) {
      for (const auto& arc : arcs_[place]) next |= bit_of(arc.first);
    }
    return {places, is_apart, accepts, next};
  }

  // Bit of a character in a 64-bit mask. Several characters may share a bit.
  static std::uint64_t bit_of(char32_t character) { return std::uint64_t{1} << character % 64; }

  bool has_end(const Places& places) const {
    return std::any_of(places.begin(), places.end(), [this](std::size_t place) { return is_end_[place]; });
  }

  // ---- Tokens ----

  void find_tokens(std::size_t blank) {
    std::size_t longest = 0;
    for (const std::u32string& spelling : spellings_) longest = std::max(longest, spelling.size());
    std::unordered_set<std::u32string> within;  // parts of words
    for (const std::u32string& word : std::exchange(words_of_phrases_, {})) {
      for (std::size_t begin = 0; begin <= word.size(); ++begin) {
        for (std::size_t size = 0; size <= longest; ++size) within.insert(word.substr(begin, size));
      }
    }
    const std::vector<unsigned char> starts = vocabulary_.word_starts();
    for (std::size_t token = 0; token < spellings_.size(); ++token) {
      const std::u32string& spelling = spellings_[token];
      const auto head = [&](std::size_t place) { return place < spelling.size() ? bit_of(spelling[place]) : ~std::uint64_t{0}; };
      heads_.push_back({head(0), head(spelling.find_first_not_of(kWordBoundary))});
      parts_.push_back(token == blank || within.count(stripped(spelling, is_mark)) > 0 ? kAny : -kAny);
      words_.push_back(token != blank ? kAny : -kAny);
      starts_.push_back(token != blank && starts[token] ? kAny : -kAny);
    }
    num_tokens_ = static_cast<std::size_t>(std::count(parts_.begin(), parts_.end(), kAny)) + (rest_ >= 0 ? 1 : 0);
  }

  // Highest score of the tokens in `chosen`. It is computed in separate lanes, so that compilers vectorize the loop.
  static float most(const float* row, const std::vector<float>& chosen) {
    constexpr std::size_t num_lanes = 8;
    float found[num_lanes];
    std::fill_n(found, num_lanes, -kAny);
    const auto take = [&](std::size_t lane, std::size_t token) {
      const float score = row[token] < chosen[token] ? row[token] : chosen[token];
      found[lane] = found[lane] < score ? score : found[lane];
    };
    std::size_t token = 0;
    for (; token + num_lanes <= chosen.size(); token += num_lanes) {
      for (std::size_t lane = 0; lane < num_lanes; ++lane) take(lane, token + lane);
    }
    for (; token < chosen.size(); ++token) take(0, token);
    return *std::max_element(found, found + num_lanes);
  }

  // Whether a token can stand between phrases: it is `rest` or a bare word boundary.
  bool is_between(int token) const { return token == rest_ || spellings_[static_cast<std::size_t>(token)] == std::u32string(1, kWordBoundary); }

  // Return the indices (exclusive) at which a phrase from `begin` on may end, and whether it may continue after the last token.
  std::pair<std::vector<std::size_t>, bool> ends_in(const std::vector<int>& tokens, std::size_t begin) const {
    if (is_between(tokens[begin])) return {{begin + 1}, false};
    std::vector<std::size_t> ends;
    Places places = after(kRoot, kWordBoundary);
    bool is_apart = true, is_complete = false;
    for (std::size_t end = begin; end < tokens.size(); ++end) {
      if (tokens[end] == rest_) return {ends, false};
      for (const char32_t character : spellings_[static_cast<std::size_t>(tokens[end])]) {
        if (character == kWordBoundary && is_apart) continue;
        is_apart = character == kWordBoundary;
        places = after(places, character);
        is_complete = has_end(places) || (is_apart && is_complete);
      }
      if (places.empty() && !is_complete) return {ends, false};
      if (is_complete) ends.push_back(end + 1);
    }
    return {ends, std::any_of(places.begin(), places.end(), [this](std::size_t place) { return !arcs_[place].empty(); })};
  }

  static inline const std::u32string kUnknown = U"[unk]";
  static inline const Places kRoot = Places(1, 0);
  static constexpr float kAny = std::numeric_limits<float>::infinity();

  Vocabulary vocabulary_;
  Symbols symbols_;
  int rest_ = -2;
  std::vector<std::pair<std::u32string, Parts>> slots_;
  std::unordered_set<std::u32string> words_of_phrases_;  // while the automaton is made
  std::vector<std::u32string> spellings_;                // text of each token
  std::vector<std::array<std::uint64_t, 2>> heads_;      // by token: bit of its first character, and the same in a hypothesis that is apart
  std::vector<float> parts_, words_, starts_;            // by token: kAny if it may be in phrases, in other words, or begin these, else -kAny
  std::size_t num_tokens_ = 0;                           // in phrases, and `rest`
  std::size_t num_steps_ = 0;                            // of the search for places, which bounds the time
  std::vector<Arcs> arcs_;                               // by place
  std::vector<bool> is_single_, is_end_;                 // by place: whether only one arc leads to it; whether a phrase ends
};

/// Caches the automata of a recogniser's most recent grammars, so that streams can share them. Not thread-safe.
class PhraseGraphs {
 public:
  /// See `PhraseGraph`.
  std::shared_ptr<const PhraseGraph> find(const std::vector<std::string>& lines, const Vocabulary& vocabulary, int blank) {
    const auto known = std::find_if(known_.begin(), known_.end(), [&](const auto& each) { return each.first == lines; });
    if (known == known_.end()) known_.emplace_front(lines, std::make_shared<const PhraseGraph>(lines, vocabulary, blank));
    else std::rotate(known_.begin(), known, known + 1);
    known_.resize(std::min(known_.size(), kMost));
    return known_[0].second;
  }

 private:
  static constexpr std::size_t kMost = 4;

  std::deque<std::pair<std::vector<std::string>, std::shared_ptr<const PhraseGraph>>> known_;  // by lines, most recent first
};

/// Lines of a grammar file, except comments ("# ...") and empty lines.
inline std::vector<std::string> grammar_lines(const std::string& content) {
  std::vector<std::string> lines;
  for (const std::string& line : lines_of(content)) {
    const std::size_t first = line.find_first_not_of(" \t\r");
    if (first != std::string::npos && line[first] != '#') lines.push_back(line);
  }
  return lines;
}

}  // namespace u2moe::runtime
