// Reads the JSON of a manifest, as strictly as RFC 8259; numbers are doubles, and keys are unique. Written here, because single
// headers are five to a hundred times as long and none refuses everything that Python refuses: picojson takes 01, 1. and
// broken UTF-8, and like nlohmann's the last of two equal keys.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "errors.hpp"

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

}  // namespace u2moe::runtime
