// Text: UTF-8 characters, scripts, letter case, and locale-independent number formats.
#pragma once

#include "letter_case.hpp"
#include "standard.hpp"

namespace u2moe::runtime {

/// Begins a word in BPE vocabularies, and replaces the space in character vocabularies.
constexpr char32_t kWordBoundary = 0x2581;

/// Decode the code point at byte `place` and move `place` past it. For invalid UTF-8, return std::nullopt and do not move.
inline std::optional<char32_t> take_utf8(const std::string& text, std::size_t& place) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[place + i]); };
  const unsigned char first = byte(0);
  const std::size_t length = first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
  if (length == 0 || place + length > text.size()) return std::nullopt;
  char32_t code = length == 1 ? first : first & (0xffU >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return std::nullopt;
    code = code << 6 | (byte(i) & 0x3fU);
  }
  const bool is_surrogate = code >= 0xd800 && code < 0xe000;
  if ((length == 3 && (code < 0x800 || is_surrogate)) || (length == 4 && (code < 0x10000 || code > 0x10ffff))) return std::nullopt;
  place += length;
  return code;
}

/// Decode UTF-8. Invalid bytes become U+FFFD.
inline std::u32string decode_utf8(const std::string& text) {
  std::u32string result;
  for (std::size_t place = 0; place < text.size();) {
    const std::optional<char32_t> code = take_utf8(text, place);
    result += code.value_or(U'\ufffd');
    if (!code) ++place;
  }
  return result;
}

inline std::string encode_utf8(const std::u32string& text) {
  std::string result;
  for (const char32_t code : text) {
    const auto last = [code](int shift) { return static_cast<char>(0x80 | (code >> shift & 0x3f)); };
    if (code < 0x80) result += static_cast<char>(code);
    else if (code < 0x800) result += {static_cast<char>(0xc0 | code >> 6), last(0)};
    else if (code < 0x10000) result += {static_cast<char>(0xe0 | code >> 12), last(6), last(0)};
    else result += {static_cast<char>(0xf0 | code >> 18), last(12), last(6), last(0)};
  }
  return result;
}

/// Convert a text to valid UTF-8 for display. Invalid bytes become \xNN.
inline std::string legible(const std::string& text) {
  std::string result;
  for (std::size_t place = 0; place < text.size();) {
    const std::size_t begin = place;
    if (take_utf8(text, place)) {
      result.append(text, begin, place - begin);
    } else {
      const auto byte = static_cast<unsigned char>(text[place++]);
      result += {'\\', 'x', "0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    }
  }
  return result;
}

/// Split the content of a text file into lines. Line endings and a byte order mark are removed.
inline std::vector<std::string> lines_of(const std::string& content) {
  std::vector<std::string> lines;
  for (std::size_t begin = content.compare(0, 3, "\xef\xbb\xbf") == 0 ? 3 : 0; begin < content.size();) {
    const std::size_t end = std::min(content.find('\n', begin), content.size());
    lines.push_back(content.substr(begin, end - begin));
    if (!lines.back().empty() && lines.back().back() == '\r') lines.back().pop_back();
    begin = end + 1;
  }
  return lines;
}

/// Join the texts of items.
template <class Items, class Text>
std::string joined(const Items& items, const char* separator, Text text) {
  std::string all;
  for (const auto& item : items) all += (all.empty() ? "" : separator) + std::string(text(item));
  return all;
}

inline std::string joined(const std::vector<std::string>& items, const char* separator) {
  return joined(items, separator, [](const std::string& item) { return item; });
}

/// Whether a word or symbol is a marker, such as <s>, <unk> or a class name. Markers have no spelling.
template <class Text>
bool is_marker(const Text& word) {
  return word.size() > 2 && word.front() == '<' && word.back() == '>';
}

/// Same as Python's `str.isspace`.
inline bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/// Whether a character belongs to a script without spaces (Chinese, Japanese).
inline bool is_spaceless(char32_t c) {
  return (c >= 0x2e80 && c <= 0x312f) || (c >= 0x3190 && c <= 0x9fff) || (c >= 0xf900 && c <= 0xfaff) ||
         (c >= 0xff66 && c <= 0xff9f) || (c >= 0x1b000 && c <= 0x1b2ff) || (c >= 0x20000 && c <= 0x3ffff);
}

/// Whether a character belongs to a script without spaces, or to Korean, whose words have endings.
inline bool is_syllabic(char32_t c) {
  return is_spaceless(c) || (c >= 0x1100 && c <= 0x11ff) || (c >= 0x3130 && c <= 0x318f) || (c >= 0xa960 && c <= 0xa97f) ||
         (c >= 0xac00 && c <= 0xd7ff);
}

inline bool contains(const LetterRange& range, std::int64_t c) {
  return c >= range.first && c <= range.last && (c - range.first) % range.step == 0;
}

inline char32_t upper(char32_t c) {
  for (const LetterRange& range : kUpper) {
    if (contains(range, c)) return c + static_cast<char32_t>(range.change);
  }
  return c;
}

inline char32_t lower(char32_t c) {
  for (const LetterRange& range : kLower) {
    if (contains(range, c)) return c + static_cast<char32_t>(range.change);
  }
  for (const LetterRange& range : kUpper) {
    if (contains(range, std::int64_t{c} - range.change)) return c - static_cast<char32_t>(range.change);
  }
  return c;
}

/// Apply a function such as `upper` or `lower` to each character of a text.
inline std::string mapped(const std::string& text, char32_t (*change)(char32_t)) {
  std::u32string characters = decode_utf8(text);
  std::transform(characters.begin(), characters.end(), characters.begin(), change);
  return encode_utf8(characters);
}

/// Parse the whole text as a finite number; std::nullopt if it is not one. Unlike strtod, this does not depend on the locale.
inline std::optional<double> parse_number(std::string_view text) {
  double value = 0;
#ifdef __cpp_lib_to_chars
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
#else
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  stream >> std::noskipws >> value;
  if (stream.fail() || stream.peek() != std::istringstream::traits_type::eof()) return std::nullopt;
#endif
  return value;
}

/// Format a number with at most `num_digits` significant digits, whatever the locale.
inline std::string decimal_text(double value, int num_digits) {
#ifdef __cpp_lib_to_chars
  std::array<char, 32> text;
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, num_digits).ptr};
#else
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(num_digits);
  stream << value;
  return stream.str();
#endif
}

/// Format a number for messages: integers without a decimal point, other numbers with at most nine significant digits.
inline std::string shown_number(double value) {
  const bool is_integer = std::fabs(value) < 1e15 && value == std::floor(value);
  return is_integer ? std::to_string(static_cast<long long>(value)) : decimal_text(value, 9);
}

}  // namespace u2moe::runtime
