// The vocabulary: turns token ids into text and words.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "unicode.hpp"

namespace u2moe::runtime {

/// Whether a character stands for a space at the edge of a symbol.
bool is_mark(char32_t c);

/// A text without the characters at its ends for which `is_edge` holds.
std::u32string stripped(const std::u32string& text, bool (*is_edge)(char32_t));

/// Tokens `begin` to `end` (exclusive) of a hypothesis, and their text without surrounding spaces.
struct WordSpan {
  std::string text;
  std::size_t begin, end;
};

class Vocabulary {
 public:
  /// From lines of "symbol id".
  /// @param name what the content is, for messages.
  /// @throws BundleError a line has no id, or the ids are not exactly 0..n-1.
  static Vocabulary parse(const std::string& content, const std::string& name);

  std::size_t size() const { return symbols_.size(); }

  /// Hash of the symbols.
  std::size_t fingerprint() const { return fingerprint_; }

  /// Symbols by id, with U+2581 as in tokens.txt.
  const std::vector<std::u32string>& symbols() const { return symbols_; }

  /// Text of token ids, without leading and trailing spaces.
  std::string text(const std::vector<int>& tokens) const;

  /// Token ids split into words: at U+2581 and spaces, and around symbols of scripts without spaces.
  std::vector<WordSpan> words(const std::vector<int>& tokens) const;

 private:
  const std::u32string& symbol(int token) const { return symbols_[static_cast<std::size_t>(token)]; }

  std::vector<std::u32string> symbols_;
  std::size_t fingerprint_ = 0;
};

}  // namespace u2moe::runtime
