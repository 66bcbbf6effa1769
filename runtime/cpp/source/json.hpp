// Reads JSON as strictly as RFC 8259; numbers are doubles, and keys are unique. Written here, because single
// headers are five to a hundred times as long and none refuses everything that Python refuses: picojson takes 01, 1. and
// broken UTF-8, and like nlohmann's the last of two equal keys.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "errors.hpp"
#include "number.hpp"

namespace u2moe::runtime {

/// A JSON value. What is missing or of another type is a BundleError that names its path: "bundle.json: model: vocab_size".
class Json {
 public:
  using Object = std::map<std::string, Json>;
  using Array = std::vector<Json>;

  Json() = default;

  /// @param name what the text is, for messages.
  static Json parse(const std::string& text, const std::string& name);

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool is_boolean() const { return std::holds_alternative<bool>(value_); }
  const Object& object() const { return get<Object>("an object"); }
  const Array& array() const { return get<Array>("an array"); }
  const std::string& string() const { return get<std::string>("a string"); }
  double number() const { return get<double>("a number"); }
  bool boolean() const { return get<bool>("true or false"); }

  /// An integer from `least` to `most`.
  int integer(int least, int most) const;

  /// A number from `least` to `most`.
  double number(double least, double most) const;

  bool has(const std::string& key) const { return object().count(key) > 0; }

  /// Whether there is a field of this name that is not null.
  bool given(const std::string& key) const { return has(key) && !(*this)[key].is_null(); }

  /// The number in a field, or another where there is none.
  double number_or(const std::string& key, double otherwise, double least, double most) const {
    return has(key) ? (*this)[key].number(least, most) : otherwise;
  }

  const Json& operator[](const std::string& key) const;

  [[noreturn]] void fail(const std::string& expected) const;

 private:
  template <class T>
  explicit Json(T value) : value_(std::move(value)) {}

  template <class T>
  const T& get(const char* expected) const {
    if (const T* found = std::get_if<T>(&value_)) return *found;
    fail(expected);
  }

  std::string description() const;
  void set_path(const std::string& path);

  struct Parser;

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
  std::string path_;
};

/// A value as JSON.
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
