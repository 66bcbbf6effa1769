// Characters of UTF-8 text: code points, spaces, scripts, letter case.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace u2moe::runtime {

/// Begins a word in BPE vocabularies, and stands for a space in vocabularies of characters.
constexpr char32_t kWordBoundary = 0x2581;

/// Decodes the code point at byte `place` and advances `place`; std::nullopt, without advancing, for invalid UTF-8.
std::optional<char32_t> take_utf8(const std::string& text, std::size_t& place);

/// Decodes UTF-8; an invalid byte becomes U+FFFD.
std::u32string decode_utf8(const std::string& text);

std::string encode_utf8(const std::u32string& text);

/// Lines of a text file without their ends, and without a byte order mark.
std::vector<std::string> lines_of(const std::string& content);

/// Whether a word or symbol is a marker such as <s>, <unk> or the name of a class, and not spelled by the recogniser.
template <class Text>
bool is_marker(const Text& word) {
  return word.size() > 2 && word.front() == '<' && word.back() == '>';
}

/// The same as Python's `str.isspace`.
bool is_space(char32_t c);

/// Whether a character belongs to a script that is written without spaces (Chinese, Japanese).
bool is_spaceless(char32_t c);

/// The same for these scripts and Korean, whose words have endings.
bool is_syllabic(char32_t c);

char32_t upper(char32_t c);

char32_t lower(char32_t c);

/// A text with each character replaced, by `upper` or `lower`.
std::string mapped(const std::string& text, char32_t (*change)(char32_t));

}  // namespace u2moe::runtime
