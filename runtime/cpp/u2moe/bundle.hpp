// A bundle on disk: manifest, vocabulary, and files that are verified by their digests.
#pragma once

#include <fstream>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "sha256.hpp"
#include "vocabulary.hpp"

namespace u2moe {

class Bundle {
 public:
  /// Reads the manifest and the vocabulary.
  /// @throws BundleError the folder is no bundle, or is damaged.
  explicit Bundle(const std::string& folder) : folder_(folder) {
    const std::vector<char> content = read(kManifest);
    json_ = Json::parse(std::string(content.begin(), content.end()), path(kManifest));
    manifest = Manifest::of(json_);
    const std::vector<char> tokens = verified(kTokens);
    vocabulary = Vocabulary::parse(std::string(tokens.begin(), tokens.end()), path(kTokens));
    if (vocabulary.size() != static_cast<std::size_t>(manifest.vocab_size)) {
      throw BundleError(path(kTokens) + ": has " + std::to_string(vocabulary.size()) + " symbols, expected vocab_size " +
                        std::to_string(manifest.vocab_size));
    }
  }

  /// Whether the manifest lists a file.
  bool has(const std::string& name) const { return json_["files"].has(name); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  /// The content of a file, after its size and sha256 have been compared with the manifest. What is verified is what is
  /// used: nothing reads the file again.
  /// @throws BundleError it is not listed, or cannot be read.
  /// @throws IntegrityError it differs from the manifest.
  std::vector<char> verified(const std::string& name) const {
    const Json& digest = json_["files"][name];
    std::vector<char> content = read(name);
    if (static_cast<double>(content.size()) != digest["size"].number()) {
      throw IntegrityError(path(name) + ": size is " + std::to_string(content.size()) + " bytes, expected " +
                           std::to_string(static_cast<long long>(digest["size"].number(0, 1e15))));
    }
    const std::string found = Sha256::hex_of(content);
    if (found != digest["sha256"].string()) {
      throw IntegrityError(path(name) + ": sha256 is " + found + ", expected " + digest["sha256"].string());
    }
    return content;
  }

  Manifest manifest;
  Vocabulary vocabulary;

 private:
  static constexpr const char* kManifest = "bundle.json";
  static constexpr const char* kTokens = "tokens.txt";

  std::vector<char> read(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary | std::ios::ate);
    const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
    if (size < 0 || size > kLargestFile) throw BundleError(path(name) + ": missing, or cannot be read");  // a folder, too
    std::vector<char> content(static_cast<std::size_t>(size));
    file.seekg(0);
    if (!file.read(content.data(), size)) throw BundleError(path(name) + ": cannot be read");
    return content;
  }

  static constexpr std::streamoff kLargestFile = std::streamoff{1} << 40;

  std::string folder_;
  Json json_;
};

}  // namespace u2moe
