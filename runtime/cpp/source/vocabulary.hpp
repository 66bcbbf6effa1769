// The vocabulary of a model. It converts token ids to text and words.
#pragma once

#include "errors.hpp"

namespace u2moe::runtime {

/// Whether a character marks a space at the edge of a symbol.
inline bool is_mark(char32_t c) { return c == U' ' || c == kWordBoundary; }

/// Whether a character marks a space within a symbol.
inline bool is_blank(char32_t c) { return is_space(c) || c == kWordBoundary; }

/// Strip the characters for which `is_edge` is true from both ends of a text.
inline std::u32string stripped(const std::u32string& text, bool (*is_edge)(char32_t)) {
  const auto begin = std::find_if_not(text.begin(), text.end(), is_edge);
  return {begin, std::find_if_not(text.rbegin(), std::make_reverse_iterator(begin), is_edge).base()};
}

/// Return the characters of a symbol or phrase, with word boundaries. A run of spaces becomes one boundary. A character that is
/// a word by itself gets boundaries around it. A marker becomes a character that is neither a boundary nor part of any phrase.
inline std::u32string with_boundaries(const std::u32string& symbol, bool (*is_word)(char32_t)) {
  if (is_marker(symbol)) return std::u32string(1, U'\0');
  std::u32string result;
  const auto add_boundary = [&result] {
    if (result.empty() || result.back() != kWordBoundary) result += kWordBoundary;
  };
  for (const char32_t c : symbol) {
    if (is_blank(c) || is_word(c)) add_boundary();
    if (!is_blank(c)) result += c;
    if (is_word(c)) add_boundary();
  }
  return result;
}

/// A word of a hypothesis: its tokens `begin` to `end` (exclusive), and its text without surrounding spaces.
struct WordSpan {
  std::string text;
  std::size_t begin, end;
};

class Vocabulary {
 public:
  /// Parse lines of "symbol id".
  /// @param name what messages call the content.
  /// @param size expected number of symbols; none: any.
  /// @throws BundleError if a line has no id, or the ids are not exactly 0..size-1.
  static Vocabulary parse(const std::string& content, const std::string& name, std::optional<int> size = std::nullopt) {
    std::map<std::size_t, std::string> found;
    std::size_t number = 0;
    for (const std::string& line : lines_of(content)) {
      ++number;
      if (line.empty()) continue;
      const auto fail = [&](const std::string& what) { runtime::fail<BundleError>(name + ": line " + std::to_string(number) + what); };
      const std::size_t cut = line.find_last_of(" \t");
      const std::string digits = cut == std::string::npos ? "" : line.substr(cut + 1);
      if (cut == 0 || digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) {
        fail(" is '" + line.substr(0, 80) + "', expected 'symbol id'");
      }
      const auto [before, is_new] = found.emplace(std::stoul(digits), line.substr(0, cut));
      if (!is_new) fail(": id " + digits + " already belongs to '" + before->second + "'");
    }
    Vocabulary vocabulary;
    for (const auto& [id, symbol] : found) {
      if (id != vocabulary.symbols_.size()) {
        runtime::fail<BundleError>(name + ": no symbol has id " + std::to_string(vocabulary.symbols_.size()));
      }
      vocabulary.add(decode_utf8(symbol));
      vocabulary.fingerprint_ = vocabulary.fingerprint_ * 16777619U + std::hash<std::string>{}(symbol);
    }
    const std::size_t num = vocabulary.symbols_.size();
    if (size && num != static_cast<std::size_t>(*size)) {
      runtime::fail<BundleError>(name + ": has " + std::to_string(num) + " symbols, expected vocab_size " + std::to_string(*size));
    }
    return vocabulary;
  }

  /// Add a symbol and return its id.
  int add(const std::u32string& symbol) {
    const auto id = static_cast<int>(symbols_.size());
    symbols_.push_back(symbol);
    texts_.push_back(encode_utf8(symbol));
    for (const char32_t c : symbol) {
      has_spaceless_ |= is_spaceless(c);
      has_capital_ |= !is_marker(symbol) && lower(c) != c;
      has_small_ |= !is_marker(symbol) && upper(c) != c;
    }
    word_starts_.push_back(begins(id) ? 1 : 0);
    return id;
  }

  std::size_t size() const { return symbols_.size(); }
  std::size_t fingerprint() const { return fingerprint_; }  ///< hash of the symbols
  const std::vector<std::u32string>& symbols() const { return symbols_; }  ///< symbols by id, with U+2581 as in tokens.txt
  const std::vector<std::string>& texts() const { return texts_; }  ///< the symbols in UTF-8

  /// Text of token ids, without surrounding spaces.
  std::string text(const std::vector<int>& tokens) const {
    std::u32string result;
    for (const int token : tokens) {
      for (const char32_t c : symbol(token)) {
        if (!is_blank(c)) result += c;
        else if (!result.empty() && result.back() != U' ') result += U' ';
      }
    }
    if (!result.empty() && result.back() == U' ') result.pop_back();
    return encode_utf8(result);
  }

  /// Split token ids into words: at U+2581 and spaces, and around symbols of scripts without spaces.
  std::vector<WordSpan> words(const std::vector<int>& tokens) const {
    std::vector<WordSpan> words;
    std::u32string text;
    std::size_t begin = 0;
    const auto end_word = [&](std::size_t end) {
      if (!text.empty()) words.push_back({encode_utf8(text), begin, end});
      text.clear();
    };
    for (std::size_t index = 0; index < tokens.size(); ++index) {
      if (begins(tokens[index]) || (index > 0 && ends(tokens[index - 1]))) end_word(index);
      if (text.empty()) begin = index;
      text += stripped(symbol(tokens[index]), is_blank);
    }
    end_word(tokens.size());
    return words;
  }

  /// Return the complete words. The last one is complete if the next token begins a word (`has_ended`), or its last ends one.
  std::vector<WordSpan> complete_words(const std::vector<int>& tokens, bool has_ended) const {
    std::vector<WordSpan> found = words(tokens);
    if (!found.empty() && found.back().end == tokens.size() && !has_ended && !ends(tokens.back())) found.pop_back();
    return found;
  }

  bool has_spaceless() const { return has_spaceless_; }  ///< whether any symbol belongs to a script without spaces

  /// Whether the symbols contain both upper- and lower-case letters.
  bool has_both_cases() const { return has_capital_ && has_small_; }

  /// For each token, whether it begins a word.
  const std::vector<unsigned char>& word_starts() const { return word_starts_; }

 private:
  static bool is_alone(const std::u32string& symbol) {
    const std::u32string bare = stripped(symbol, is_blank);
    return !bare.empty() && std::all_of(bare.begin(), bare.end(), is_spaceless);
  }

  bool begins(int token) const { return is_mark(symbol(token).front()) || is_alone(symbol(token)); }
  bool ends(int token) const { return is_mark(symbol(token).back()) || is_alone(symbol(token)); }

  const std::u32string& symbol(int token) const { return symbols_[static_cast<std::size_t>(token)]; }

  std::vector<std::u32string> symbols_;
  std::vector<unsigned char> word_starts_;
  bool has_spaceless_ = false, has_capital_ = false, has_small_ = false;
  std::vector<std::string> texts_;
  std::size_t fingerprint_ = 0;
};

}  // namespace u2moe::runtime
