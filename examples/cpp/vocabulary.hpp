// From token ids to text and words.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace u2moe {

struct WordSpan {
  std::string text;
  std::size_t begin, end;  // tokens
};

class Vocabulary {
 public:
  // From lines of "symbol id".
  static Vocabulary parse(const std::string& content, int size) {
    Vocabulary vocabulary;
    vocabulary.symbols_.resize(static_cast<std::size_t>(size));
    std::vector<bool> seen(static_cast<std::size_t>(size));
    std::size_t num_seen = 0;
    for (std::size_t begin = 0; begin < content.size();) {
      std::size_t end = content.find('\n', begin);
      if (end == std::string::npos) end = content.size();
      std::string line = content.substr(begin, end - begin);
      begin = end + 1;
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty()) continue;
      const std::size_t cut = line.find_last_of(" \t");
      const std::string digits = cut == std::string::npos ? "" : line.substr(cut + 1);
      if (cut == 0 || digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) {
        throw std::runtime_error("tokens.txt: a line is '" + line + "', expected 'symbol id'");
      }
      const std::size_t id = std::stoul(digits);
      if (id >= seen.size() || seen[id]) throw std::runtime_error("tokens.txt: id " + digits + " is not expected");
      seen[id] = true;
      ++num_seen;
      vocabulary.symbols_[id] = replaced(line.substr(0, cut));
    }
    if (num_seen != seen.size()) throw std::runtime_error("tokens.txt: has " + std::to_string(num_seen) + " symbols, expected " + std::to_string(size));
    return vocabulary;
  }

  std::string text(const std::vector<int>& tokens) const {
    std::string joined, result;
    for (int token : tokens) joined += symbols_[static_cast<std::size_t>(token)];
    for (char c : joined) {
      if (!is_space(c)) result += c;
      else if (!result.empty() && result.back() != ' ') result += ' ';
    }
    if (!result.empty() && result.back() == ' ') result.pop_back();
    return result;
  }

  std::vector<WordSpan> words(const std::vector<int>& tokens) const {
    std::vector<WordSpan> words;
    std::string text;
    std::size_t begin = 0;
    bool alone = false;
    for (std::size_t index = 0; index < tokens.size(); ++index) {
      const std::string& symbol = symbols_[static_cast<std::size_t>(tokens[index])];
      const std::string bare = stripped(symbol);
      const bool symbol_alone = stands_alone(bare);
      if ((!symbol.empty() && is_space(symbol.front())) || symbol_alone || alone) {
        if (!text.empty()) words.push_back({text, begin, index});
        text.clear();
      }
      if (text.empty()) begin = index;
      text += bare;
      alone = symbol_alone || (!symbol.empty() && is_space(symbol.back()));
    }
    if (!text.empty()) words.push_back({text, begin, tokens.size()});
    return words;
  }

 private:
  static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

  // U+2581 begins words.
  static std::string replaced(std::string symbol) {
    static const std::string boundary = "\xe2\x96\x81";
    for (std::size_t place; (place = symbol.find(boundary)) != std::string::npos;) symbol.replace(place, boundary.size(), " ");
    return symbol;
  }

  static std::string stripped(const std::string& symbol) {
    std::size_t begin = 0, end = symbol.size();
    while (begin < end && is_space(symbol[begin])) ++begin;
    while (end > begin && is_space(symbol[end - 1])) --end;
    return symbol.substr(begin, end - begin);
  }

  // Whether a symbol belongs to a script without spaces (Chinese, Japanese), so that it is a word by itself.
  static bool stands_alone(const std::string& symbol) {
    static const std::pair<unsigned, unsigned> ranges[] = {{0x2e80, 0x312f}, {0x3190, 0x9fff}, {0xf900, 0xfaff},
                                                           {0xff66, 0xff9f}, {0x1b000, 0x1b2ff}, {0x20000, 0x3ffff}};
    for (std::size_t place = 0; place < symbol.size();) {
      const unsigned char first = static_cast<unsigned char>(symbol[place]);
      const int length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
      unsigned code = length == 1 ? first : first & (0xffu >> (length + 1));
      for (int i = 1; i < length && place + i < symbol.size(); ++i) code = code << 6 | (static_cast<unsigned char>(symbol[place + i]) & 63u);
      bool within = false;
      for (const auto& [low, high] : ranges) within |= low <= code && code <= high;
      if (!within) return false;
      place += static_cast<std::size_t>(length);
    }
    return !symbol.empty();
  }

  std::vector<std::string> symbols_;
};

}  // namespace u2moe
