// Strict JSON (RFC 8259). Numbers are doubles, and keys must be unique. Single-header libraries are five to a hundred times as
// long, and accept input that Python rejects. picojson accepts "01", "1." and invalid UTF-8. picojson and nlohmann's library
// keep the last of two equal keys.
#pragma once

#include "declared.hpp"
#include "errors.hpp"

namespace u2moe::runtime {

/// A JSON value. Access to a missing value, or to a value of the wrong type, throws a BundleError. Its message names the path
/// of the value, such as "bundle.json: model: vocab_size".
class Json {
 public:
  using Object = std::map<std::string, Json>;
  using Array = std::vector<Json>;

  Json() = default;

  /// Parse JSON. `name` is what error messages call the text.
  static Json parse(const std::string& text, const std::string& name) {
    Parser parser{text, name};
    Json value = parser.value(0);
    parser.blanks();
    if (parser.place != text.size()) parser.fail("unexpected text");
    value.set_path(name);
    return value;
  }

  bool is_array() const { return std::holds_alternative<Array>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool is_boolean() const { return std::holds_alternative<bool>(value_); }
  const Object& object() const { return get<Object>("an object"); }
  const Array& array() const { return get<Array>("an array"); }
  Object& fields() { return const_cast<Object&>(object()); }
  Array& items() { return const_cast<Array&>(array()); }
  const std::string& string() const { return get<std::string>("a string"); }
  double number() const { return get<double>("a number"); }
  bool boolean() const { return get<bool>("true or false"); }

  /// Return the value, which must be an integer from `least` to `most`.
  int integer(int least, int most) const {
    const double found = number();
    if (found != std::floor(found) || found < least || found > most) {
      fail("an integer from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return static_cast<int>(found);
  }

  /// Return the value, which must be a number from `least` to `most`.
  double number(double least, double most) const {
    const double found = number();
    if (!(found >= least && found <= most)) fail("a number from " + shown_number(least) + " to " + shown_number(most));
    return found;
  }

  bool has(const std::string& key) const { return object().count(key) > 0; }

  /// Whether the field exists and is not null.
  bool given(const std::string& key) const { return has(key) && !(*this)[key].is_null(); }

  const Json& operator[](const std::string& key) const {
    const auto found = object().find(key);
    if (found == object().end()) runtime::fail<BundleError>(path_ + ": field '" + key + "' is missing");
    return found->second;
  }

  const Json& operator[](std::size_t index) const {
    if (index >= array().size()) fail("more than " + std::to_string(index) + " items");
    return array()[index];
  }

  const std::string& path() const { return path_; }  ///< path of the value, for messages
  void set_path(const std::string& path) {
    path_ = path;
    if (auto* object = std::get_if<Object>(&value_)) {
      for (auto& [key, value] : *object) value.set_path(path + ": " + key);
    }
    if (auto* items = std::get_if<Array>(&value_)) {
      for (std::size_t i = 0; i < items->size(); ++i) (*items)[i].set_path(path + ": " + std::to_string(i));
    }
  }

  [[noreturn]] void fail(const std::string& expected) const {
    runtime::fail<BundleError>(path_ + ": found " + description() + ", expected " + expected);
  }

 private:
  template <class T>
  explicit Json(T value) : value_(std::move(value)) {}

  template <class T>
  const T& get(const char* expected) const {
    if (const T* found = std::get_if<T>(&value_)) return *found;
    fail(expected);
  }

  std::string description() const {
    if (const auto* text = std::get_if<std::string>(&value_)) return "'" + text->substr(0, 80) + "'";
    if (const auto* number = std::get_if<double>(&value_)) return shown_number(*number);
    if (const auto* truth = std::get_if<bool>(&value_)) return *truth ? "true" : "false";
    return is_null() ? "null" : std::holds_alternative<Array>(value_) ? "an array" : "an object";
  }

  struct Parser {
    const std::string& text;
    const std::string& name;
    std::size_t place = 0;

    [[noreturn]] void fail(const std::string& what) const {
      runtime::fail<BundleError>(name + ": is not valid JSON: " + what + " at byte " + std::to_string(place));
    }
    void blanks() { place = std::min(text.find_first_not_of(" \n\t\r", place), text.size()); }
    bool takes(char c) {
      blanks();
      return takes_any({&c, 1});
    }
    void expect(char c) {
      if (!takes(c)) fail(std::string("expected ") + c);
    }
    bool takes_word(const std::string& word) {
      if (text.compare(place, word.size(), word) != 0) return false;
      place += word.size();
      return true;
    }

    Json value(int depth) {
      if (depth > 100) fail("nested too deeply");
      blanks();
      const char c = place < text.size() ? text[place] : '\0';
      if (c == '{') return object(depth);
      if (c == '[') return array(depth);
      if (c == '"') return Json{quoted()};
      if (takes_word("true")) return Json{true};
      if (takes_word("false")) return Json{false};
      if (takes_word("null")) return Json{nullptr};
      return Json{number()};
    }

    double number() {
      const std::size_t begin = place;
      takes_any("-");
      if (!takes_any("0")) digits();  // only a decimal point may follow a leading zero
      if (takes_any(".")) digits();
      if (takes_any("eE")) {
        takes_any("+-");
        digits();
      }
      const auto found = parse_number(text.substr(begin, place - begin));
      if (!found) fail("expected a value");  // too large for a double
      return *found;
    }

    bool takes_any(std::string_view characters) {
      if (place >= text.size() || characters.find(text[place]) == std::string_view::npos) return false;
      ++place;
      return true;
    }

    void digits() {
      constexpr std::string_view all = "0123456789";
      if (!takes_any(all)) fail("expected a value");
      while (takes_any(all)) {}
    }

    Json object(int depth) {
      Object found;
      expect('{');
      if (takes('}')) return Json{found};
      do {
        blanks();
        std::string key = quoted();
        expect(':');
        if (!found.emplace(key, value(depth + 1)).second) fail("duplicate key '" + key + "'");
      } while (takes(','));
      expect('}');
      return Json{found};
    }

    Json array(int depth) {
      Array found;
      expect('[');
      if (takes(']')) return Json{found};
      do {
        found.push_back(value(depth + 1));
      } while (takes(','));
      expect(']');
      return Json{found};
    }

    std::string quoted() {
      if (!takes_any("\"")) fail("expected a string");
      std::string found;
      while (!takes_any("\"")) {
        if (place >= text.size()) fail("unterminated string");
        found += takes_any("\\") ? escaped() : plain();
      }
      return found;
    }

    std::string plain() {
      const std::size_t begin = place;
      if (static_cast<unsigned char>(text[place]) < 0x20) fail("unescaped control character");
      if (!take_utf8(text, place)) fail("invalid UTF-8");
      return text.substr(begin, place - begin);
    }

    std::string escaped() {
      constexpr std::string_view codes = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      if (takes_any("u")) return surrogates();
      if (!takes_any(codes)) fail("invalid escape");
      return {meant[codes.find(text[place - 1])]};
    }

    std::string surrogates() {
      const char32_t code = unit();
      if (code < 0xd800 || code >= 0xe000) return encode_utf8({code});
      if (code >= 0xdc00 || !takes_word("\\u")) fail("unpaired surrogate");
      const char32_t low = unit();
      if (low < 0xdc00 || low >= 0xe000) fail("unpaired surrogate");
      return encode_utf8({0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00)});
    }

    char32_t unit() {
      const std::string hex = text.substr(place, 4);
      if (hex.size() < 4 || hex.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) fail("invalid escape");
      place += 4;
      return static_cast<char32_t>(std::stoul(hex, nullptr, 16));
    }
  };

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
  std::string path_;
};

/// Write a value as JSON.
inline std::string json_text(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') result += '\\';
    if (code >= 0x20) result += c;
    else result += {'\\', 'u', '0', '0', "01"[code >> 4], "0123456789abcdef"[code & 15]};
  }
  return result + '"';
}

inline std::string json_text(int number) { return std::to_string(number); }

/// Write a number so that reading it returns the same number.
inline std::string json_text(double number) {
  const std::string text = decimal_text(number, 15);
  return parse_number(text) == number ? text : decimal_text(number, 17);
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

// ---- Objects as declared in Python: fields, defaults and numbers ----

/// Completes objects from bundles or options: fills missing fields with their defaults, and checks for unknown fields.
class Records {
 public:
  /// @param by name of the program that wrote the bundle; "" for a caller's options, in which every unknown field is an error.
  explicit Records(std::string by = "") : by_(std::move(by)) {}

  /// @param kind name of the object's class in Python, with the prefix {} for a map of such objects.
  /// @throws BundleError if a field without a default is missing, or if an unknown field is not declared harmless.
  Json completed(Json value, const std::string& kind) {
    const std::string path = value.path();
    complete(value, kind);
    value.set_path(path);
    return value;
  }

  std::vector<std::string> warnings;  ///< features lost because unknown harmless fields are ignored

 private:
  void complete(Json& value, const std::string& kind) {
    static const Json* const declared = new Json(Json::parse(kDeclared, "declared.hpp"));
    if (kind.empty() || value.is_null()) return;
    if (value.is_array()) {
      for (Json& item : value.items()) complete(item, kind);
    } else if (kind[0] == '{') {
      for (auto& [name, item] : value.fields()) complete(item, kind.substr(2));
    } else {
      const Json::Object& known = (*declared)[kind].object();
      for (const auto& [name, field] : value.object()) {
        if (!known.count(name) && name != kHarmless) pass_over(value, name);
      }
      for (const auto& [name, field] : known) {
        if (!value.has(name) && field.array().size() > 1) value.fields().emplace(name, field[1]);
        value[name];  // throws if it is missing
        complete(value.fields()[name], field[0].string());
      }
    }
  }

  void pass_over(const Json& value, const std::string& name) {
    if (by_.empty()) value[name].fail("no field of this name");
    const std::string message = value[name].path() + " is a field that this version of u2moe does not know; the bundle was written by " + by_;
    if (!value.has(kHarmless) || !value[kHarmless].has(name)) fail<BundleError>(message + ": use that version, or a newer one");
    warnings.push_back(message + ". Without the field: " + value[kHarmless][name].string());
  }

  static constexpr const char* kHarmless = "harmless";

  std::string by_;
};

/// Read the numbers of a struct in declared.hpp from a JSON object. Numbers whose field is missing or null do not change.
/// @throws BundleError if a field is not a number in its range.
template <class Numbers>
void read_numbers(const Json& json, Numbers& numbers) {
  Numbers::each([&](const char* name, auto own, const Range& range, auto...) {
    if (!json.given(name)) return;
    using Value = std::decay_t<decltype(numbers.*own)>;
    const double found = json[name].number(range.least, range.most);
    if (std::is_same_v<Value, int> && found != std::floor(found)) json[name].fail("an integer");
    numbers.*own = static_cast<Value>(found);
  });
}

/// Check the numbers of a struct in declared.hpp.
/// @throws InvalidArgument if a number is out of range.
template <class Numbers>
void check_numbers(const Numbers& numbers) {
  Numbers::each([&](const char* name, auto own, const Range& range, auto...) {
    check_range(name, static_cast<double>(numbers.*own), range.least, range.most);
  });
}

}  // namespace u2moe::runtime
