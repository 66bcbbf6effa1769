// Reads the JSON of a manifest. Strict, and no more than that: numbers are doubles.
#pragma once

#include <cmath>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace u2moe {

class Json {
 public:
  using Object = std::map<std::string, Json>;
  using Array = std::vector<Json>;

  static Json parse(const std::string& text) {
    Parser parser{text};
    Json value = parser.value(0);
    parser.blanks();
    if (parser.place != text.size()) parser.fail("more text");
    return value;
  }

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  const Object& object() const { return get<Object>("an object"); }
  const std::string& string() const { return get<std::string>("a string"); }
  double number() const { return get<double>("a number"); }
  bool boolean() const { return get<bool>("true or false"); }

  int integer() const {
    const double found = number();
    if (found != std::floor(found) || std::abs(found) > 2e9) throw std::runtime_error("bundle.json: expected an integer");
    return static_cast<int>(found);
  }

  bool has(const std::string& key) const { return object().count(key) > 0; }

  const Json& operator[](const std::string& key) const {
    const auto found = object().find(key);
    if (found == object().end()) throw std::runtime_error("bundle.json: field '" + key + "' is missing");
    return found->second;
  }

 private:
  template <class T>
  const T& get(const char* expected) const {
    if (const T* found = std::get_if<T>(&value_)) return *found;
    throw std::runtime_error(std::string("bundle.json: expected ") + expected);
  }

  struct Parser {
    const std::string& text;
    std::size_t place = 0;

    [[noreturn]] void fail(const std::string& what) const {
      throw std::runtime_error("bundle.json: is not valid JSON: " + what + " at byte " + std::to_string(place));
    }
    void blanks() {
      while (place < text.size() && (text[place] == ' ' || text[place] == '\n' || text[place] == '\t' || text[place] == '\r')) ++place;
    }
    bool takes(char c) {
      blanks();
      if (place >= text.size() || text[place] != c) return false;
      ++place;
      return true;
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
      if (depth > 100) fail("too deep");
      blanks();
      if (place >= text.size()) fail("no value");
      const char c = text[place];
      if (c == '{') return object(depth);
      if (c == '[') return array(depth);
      if (c == '"') return Json{quoted()};
      if (takes_word("true")) return Json{true};
      if (takes_word("false")) return Json{false};
      if (takes_word("null")) return Json{nullptr};
      char* end = nullptr;
      const double found = std::strtod(text.c_str() + place, &end);
      if ((c != '-' && (c < '0' || c > '9')) || !std::isfinite(found)) fail("no value");
      place = static_cast<std::size_t>(end - text.c_str());
      return Json{found};
    }

    Json object(int depth) {
      Object found;
      expect('{');
      if (takes('}')) return Json{found};
      do {
        blanks();
        std::string key = quoted();
        expect(':');
        if (!found.emplace(key, value(depth + 1)).second) fail("key '" + key + "' twice");
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
      if (place >= text.size() || text[place] != '"') fail("expected a string");
      std::string found;
      for (++place; place < text.size() && text[place] != '"'; ++place) {
        if (text[place] != '\\') {
          found += text[place];
          continue;
        }
        if (++place >= text.size()) fail("unfinished string");
        const std::string codes = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        const std::size_t index = codes.find(text[place]);
        if (index != std::string::npos) {
          found += meant[index];
        } else if (text[place] == 'u') {
          found += escaped();
        } else {
          fail("unknown escape");
        }
      }
      if (place >= text.size()) fail("unfinished string");
      ++place;
      return found;
    }

    std::string escaped() {
      const auto unit = [this] {
        if (place + 4 >= text.size()) fail("unfinished escape");
        const unsigned long code = std::strtoul(text.substr(place + 1, 4).c_str(), nullptr, 16);
        place += 4;
        return static_cast<unsigned>(code);
      };
      unsigned code = unit();
      if (code >= 0xd800 && code < 0xdc00 && text.compare(place + 1, 2, "\\u") == 0) {
        place += 2;
        code = 0x10000 + ((code - 0xd800) << 10) + (unit() - 0xdc00);
      }
      std::string utf8;
      if (code < 0x80) return std::string(1, static_cast<char>(code));
      if (code < 0x800) return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
      if (code < 0x10000) {
        return {static_cast<char>(0xe0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 63)), static_cast<char>(0x80 | (code & 63))};
      }
      return {static_cast<char>(0xf0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 63)),
              static_cast<char>(0x80 | (code >> 6 & 63)), static_cast<char>(0x80 | (code & 63))};
    }
  };

  template <class T>
  explicit Json(T value) : value_(std::move(value)) {}

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_;

 public:
  Json() : value_(nullptr) {}
};

}  // namespace u2moe
