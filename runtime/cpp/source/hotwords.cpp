#include "hotwords.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <set>

#include "errors.hpp"
#include "number.hpp"

namespace u2moe::runtime {
namespace {

using Words = std::vector<std::u32string>;

constexpr double kRounding = 1e-6;  // far more than the order of additions can change

// Characters of a symbol or phrase, with a boundary for spaces and around characters that count as words.
std::u32string read(const std::u32string& symbol) {
  if (is_marker(symbol)) return std::u32string(1, U'\0');  // part of no phrase, and not a boundary
  std::u32string result;
  const auto add_boundary = [&result] {
    if (result.empty() || result.back() != kWordBoundary) result += kWordBoundary;
  };
  for (const char32_t c : symbol) {
    if (is_space(c) || c == kWordBoundary) {
      add_boundary();
    } else if (is_syllabic(c)) {
      add_boundary();
      result += c;
      add_boundary();
    } else {
      result += c;
    }
  }
  return result;
}

// The symbols of a vocabulary as parts of words.
class Symbols {
 public:
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

  // The words of a phrase in the characters of the vocabulary, and its bonus.
  std::pair<Words, double> measured(const Hotword& hotword) const {
    const auto fail = [&](const std::string& what) { runtime::fail<InvalidArgument>("hotword '" + hotword.phrase + "'" + what); };
    if (!(hotword.weight > 0 && hotword.weight <= 100)) {
      fail(": weight must be above 0 and at most 100, got " + std::to_string(hotword.weight));
    }
    Words words(1);
    for (const char32_t c : read(decode_utf8(hotword.phrase))) {
      if (c == kWordBoundary) {
        if (!words.back().empty()) words.emplace_back();
        continue;
      }
      const char32_t forms[] = {c, upper(c), lower(c)};
      const auto form = std::find_if(std::begin(forms), std::end(forms), [&](char32_t each) { return characters_.count(each) > 0; });
      if (form == std::end(forms)) fail(": the vocabulary has no '" + encode_utf8({c}) + "'");
      words.back() += *form;
    }
    if (words.back().empty()) words.pop_back();
    if (words.empty()) fail(" is empty");
    std::size_t num_tokens = 0;
    for (const std::u32string& word : words) {
      const std::size_t fewest = fewest_tokens(word);
      if (fewest == kImpossible) fail(": the vocabulary cannot write '" + encode_utf8(word) + "'");
      num_tokens += fewest;
    }
    return {words, hotword.weight * static_cast<double>(num_tokens)};
  }

 private:
  static constexpr std::size_t kImpossible = std::numeric_limits<std::size_t>::max() / 2;

  // Tokens in the shortest tokenization of a word.
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

  std::set<std::u32string> inner_, first_;  // those that continue a word, those that may begin one
  std::set<char32_t> characters_;
  std::size_t longest_ = 0;
};

}  // namespace

std::vector<Hotword> parse_hotwords(const std::string& content) {
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
    if (colon == std::string::npos) {
      hotwords.push_back({line});
      continue;
    }
    const std::string weight = trimmed(line.substr(colon + 2));
    const auto value = parse_number(weight);
    if (!value) {
      runtime::fail<InvalidArgument>("hotwords line " + std::to_string(number) + ": weight must be a number, got '" + weight + "'");
    }
    hotwords.push_back({trimmed(line.substr(0, colon)), *value});
  }
  return hotwords;
}

ContextGraph::ContextGraph(const std::vector<Hotword>& hotwords, const Vocabulary& vocabulary) : fingerprint_(vocabulary.fingerprint()) {
  for (const std::u32string& symbol : vocabulary.symbols()) spellings_.push_back(read(symbol));
  add_state();
  const Symbols symbols(vocabulary);
  std::map<Words, double> bonuses;
  for (const Hotword& hotword : hotwords) {
    const auto [words, bonus] = symbols.measured(hotword);
    double& most = bonuses[words];
    most = std::max(most, bonus);
  }
  if (bonuses.empty()) runtime::fail<InvalidArgument>("hotwords are empty: leave them out for none");
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
  for (std::size_t state = 0; state < states_.size(); ++state) {
    const auto arc = states_[state].next.find(kWordBoundary);
    if (arc != states_[state].next.end()) states_[arc->second].is_after_boundary = true;
  }
}

std::size_t ContextGraph::add_state() {
  states_.emplace_back();
  return states_.size() - 1;
}

std::size_t ContextGraph::grow(std::size_t state, char32_t character) {
  const auto found = states_[state].next.find(character);
  if (found != states_[state].next.end()) return found->second;
  const std::size_t added = add_state();
  states_[state].next[character] = added;
  return added;
}

void ContextGraph::add_phrase(const Words& words, double bonus) {
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

void ContextGraph::hold(std::size_t state, double bonus, std::size_t matched, std::size_t total) {
  states_[state].partial = std::max(states_[state].partial, bonus * static_cast<double>(matched) / static_cast<double>(total));
}

// Set the failure links. Each state also inherits the bonuses that its suffixes complete, and their share if it is larger.
void ContextGraph::link() {
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

std::size_t ContextGraph::arc(std::size_t state, char32_t character) const {
  for (;; state = states_[state].fail) {
    const auto found = states_[state].next.find(character);
    if (found != states_[state].next.end()) return found->second;
    if (state == 0) return 0;
  }
}

ContextGraph::Move ContextGraph::read_on(std::size_t state, const std::u32string& characters) const {
  double bonus = 0;
  for (const char32_t character : characters) {
    if (character == kWordBoundary && states_[state].is_after_boundary) continue;
    state = arc(state, character);
    bonus += states_[state].output;
  }
  return {state, bonus};
}

}  // namespace u2moe::runtime
