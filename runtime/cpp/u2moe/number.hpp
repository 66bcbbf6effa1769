// Parses numbers in the same way in every locale; strtod expects a comma in some.
#pragma once

#include <locale>
#include <optional>
#include <sstream>
#include <string>

namespace u2moe {

/// Parses the whole text as a finite number; std::nullopt if it is none.
inline std::optional<double> parse_number(const std::string& text) {
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> std::noskipws >> value;
  if (stream.fail() || stream.peek() != std::istringstream::traits_type::eof()) return std::nullopt;
  return value;
}

}  // namespace u2moe
