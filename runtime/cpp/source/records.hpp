// Objects of JSON as Python declares them: which fields they have, what those are that are missing, and how numbers are read.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "declared.hpp"
#include "errors.hpp"
#include "json.hpp"

namespace u2moe::runtime {

/// Completes values of bundles, and of options, with the defaults of fields that are missing.
class Records {
 public:
  /// @param by the program that wrote the values.
  explicit Records(std::string by = "") : by_(std::move(by)) {}

  /// @param kind name of the class in Python, after {} for a map of such.
  /// @throws BundleError a field is missing that has no default, or is unknown, and not harmless by what the object itself says.
  Json completed(Json value, const std::string& kind) {
    const std::string path = value.path();
    complete(value, kind);
    value.set_path(path);
    return value;
  }

  /// What harmless fields say that is lost without them.
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  static const Json& declared() {
    static const Json* const all = new Json(Json::parse(kDeclared, "declared.hpp"));
    return *all;
  }

  void complete(Json& value, const std::string& kind) {
    if (kind.empty() || value.is_null()) return;
    if (value.is_array()) {
      for (Json& item : value.items()) complete(item, kind);
    } else if (kind[0] == '{') {
      for (auto& [name, item] : value.fields()) complete(item, kind.substr(2));
    } else {
      complete_object(value, declared()[kind].object());
    }
  }

  void complete_object(Json& value, const Json::Object& known) {
    check_names(value, known);
    Json::Object& own = value.fields();
    for (const auto& [name, field] : known) {
      if (!own.count(name) && field.array().size() > 1) own.emplace(name, field[1]);
      value[name];  // fails if it is missing
      complete(own.at(name), field[0].string());
    }
  }

  void check_names(Json& value, const Json::Object& known) {
    for (const auto& [name, field] : value.object()) {
      if (known.count(name) || name == kHarmless) continue;
      if (by_.empty()) field.fail("no field of this name");
      const std::string message = field.path() + " is a field that this version of u2moe does not know; the bundle is by " + by_;
      if (!value.has(kHarmless) || !value[kHarmless].has(name)) fail<BundleError>(message + ": use that version, or a newer one");
      warnings_.push_back(message + ", without it: " + value[kHarmless][name].string());
    }
  }

  static constexpr const char* kHarmless = "harmless";

  std::string by_;
  std::vector<std::string> warnings_;
};

/// Set the numbers of a struct of declared.hpp that an object has.
/// @throws BundleError one is out of range.
template <class Numbers>
void read_numbers(const Json& json, Numbers& numbers) {
  Numbers::each([&](const char* name, auto own, const Range& range, auto...) {
    if (!json.given(name)) return;
    auto& value = numbers.*own;
    if constexpr (std::is_same_v<std::decay_t<decltype(value)>, int>) value = json[name].integer(static_cast<int>(range.least), static_cast<int>(range.most));
    else value = json[name].number(range.least, range.most);
  });
}

/// @throws InvalidArgument a number of a struct of declared.hpp is out of range.
template <class Numbers>
void check_numbers(const Numbers& numbers) {
  Numbers::each([&](const char* name, auto own, const Range& range, auto...) {
    check_range(name, static_cast<double>(numbers.*own), range.least, range.most);
  });
}

}  // namespace u2moe::runtime
