// Numbers as text, in the same way in every locale; strtod expects a comma in some.
#pragma once

#include <charconv>
#include <cmath>
#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

namespace u2moe::runtime {

/// Parses the whole text as a finite number; std::nullopt if it is none.
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

/// A number for people: integers plainly, others with at most nine significant digits.
inline std::string shown_number(double value) {
  if (std::fabs(value) < 1e15 && value == std::floor(value)) return std::to_string(static_cast<long long>(value));
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(9);
  stream << value;
  return stream.str();
}

}  // namespace u2moe::runtime
