// A bundle: manifest, vocabulary, and files that are verified by their digests.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <variant>

#include "hotwords.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "vocabulary.hpp"

namespace u2moe::runtime {

/// Where a bundle is: a folder, or files in memory by their names.
using Location = std::variant<std::string, std::map<std::string, std::string>>;

class Bundle {
 public:
  /// Reads the manifest and the vocabulary.
  /// @throws BundleError the files are no bundle, or are damaged.
  explicit Bundle(Location location);

  /// Whether the manifest lists a file.
  bool has(const std::string& name) const { return json_["files"].has(name); }

  /// What messages call a file.
  std::string path(const std::string& name) const;

  /// The content of a file, after its size and sha256 have been compared with the manifest. What is verified is what is
  /// used: nothing reads the file again.
  /// @throws BundleError it is not listed, or cannot be read.
  /// @throws IntegrityError it differs from the manifest.
  std::string verified(const std::string& name) const;

  /// The hotwords that it searches for by default; null: none.
  /// @throws BundleError the vocabulary cannot spell them.
  std::shared_ptr<const ContextGraph> hotwords() const;

  /// The language model that it searches with by default; null: none.
  /// @throws LanguageModelError it is damaged, or does not fit the vocabulary.
  std::shared_ptr<const Fusion> language_model() const;

  const Manifest& manifest() const { return manifest_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  std::string read(const std::string& name) const;

  Location location_;
  Json json_;
  Manifest manifest_;
  Vocabulary vocabulary_;
};

/// The content of a file; false if it cannot be read.
bool read_file(const std::string& path, std::string& content);

}  // namespace u2moe::runtime
