// Writes JSON.
#pragma once

#include <string>
#include <vector>

#include "number.hpp"

namespace u2moe::runtime {

inline std::string json_text(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') result += '\\';
    if (code >= 0x20) {
      result += c;
    } else {
      result += {'\\', 'u', '0', '0', "01"[code >> 4], "0123456789abcdef"[code & 15]};
    }
  }
  return result + '"';
}

inline std::string json_text(int number) { return std::to_string(number); }

/// So that reading it gives the same number.
inline std::string json_text(double number) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(15);
  stream << number;
  if (parse_number(stream.str()) == number) return stream.str();
  stream.str("");
  stream.precision(17);
  stream << number;
  return stream.str();
}

template <class Items, class Show>
std::string json_list(const Items& items, Show show) {
  std::string result = "[";
  for (const auto& item : items) result += (result.size() > 1 ? ", " : "") + show(item);
  return result + "]";
}

template <class T>
std::string json_text(const std::vector<T>& items) {
  return json_list(items, [](const T& item) { return json_text(item); });
}

}  // namespace u2moe::runtime
