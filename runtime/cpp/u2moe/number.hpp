// Numbers from text, the same in every locale: where a program has set one, strtod may expect a comma.
#pragma once

#include <locale>
#include <optional>
#include <sstream>
#include <string>

namespace u2moe {

/// The number that a text is, all of it; none if it is no finite number.
inline std::optional<double> parse_number(const std::string& text) {
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> std::noskipws >> value;
  if (stream.fail() || stream.peek() != std::istringstream::traits_type::eof()) return std::nullopt;
  return value;
}

}  // namespace u2moe
