// Objects of JSON as Python declares them: which fields they have, what those are that are missing, and how numbers are read.
#pragma once

#include "declared.hpp"
#include "errors.hpp"
#include "json.hpp"

namespace u2moe::runtime {

/// Completes objects of bundles, and of options, with the defaults of fields that are missing.
class Records {
 public:
  /// @param by the program that wrote them; "": a caller, for whom no field is harmless.
  explicit Records(std::string by = "") : by_(std::move(by)) {}

  /// @param kind name of the class in Python, after {} for a map of such.
  /// @throws BundleError a field is missing that has no default, or is unknown, and not harmless by what the object itself says.
  Json completed(Json value, const std::string& kind) {
    const std::string path = value.path();
    complete(value, kind);
    value.set_path(path);
    return value;
  }

  std::vector<std::string> warnings;  ///< what is lost by harmless fields that are unknown

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
        value[name];  // fails if it is missing
        complete(value.fields()[name], field[0].string());
      }
    }
  }

  void pass_over(const Json& value, const std::string& name) {
    if (by_.empty()) value[name].fail("no field of this name");
    const std::string message = value[name].path() + " is a field that this version of u2moe does not know; the bundle is by " + by_;
    if (!value.has(kHarmless) || !value[kHarmless].has(name)) fail<BundleError>(message + ": use that version, or a newer one");
    warnings.push_back(message + ", without it: " + value[kHarmless][name].string());
  }

  static constexpr const char* kHarmless = "harmless";

  std::string by_;
};

/// Set the numbers of a struct of declared.hpp that an object has.
/// @throws BundleError one is out of range.
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

/// @throws InvalidArgument a number of a struct of declared.hpp is out of range.
template <class Numbers>
void check_numbers(const Numbers& numbers) {
  Numbers::each([&](const char* name, auto own, const Range& range, auto...) {
    check_range(name, static_cast<double>(numbers.*own), range.least, range.most);
  });
}

}  // namespace u2moe::runtime
