// A bundle: manifest, vocabulary and files verified by their digests.
#pragma once

#include <filesystem>
#include <fstream>

#include "hotwords.hpp"
#include "manifest.hpp"
#include "signature.hpp"

namespace u2moe::runtime {

/// Location of a bundle: a folder, or a map from the names of its files to their contents.
using Location = std::variant<std::string, std::map<std::string, std::string>>;

/// Return the content of a file.
/// @throws Kind if the file cannot be read.
template <class Kind>
std::string content_of(const std::string& path) {
  std::ifstream file(std::filesystem::u8path(path), std::ios::binary | std::ios::ate);
  constexpr std::streamoff largest = std::streamoff{1} << 40;  // a folder reports a larger size
  const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  std::string content(size < 0 || size > largest ? 0 : static_cast<std::size_t>(size), '\0');
  file.seekg(0);
  if (size < 0 || size > largest || !file.read(content.data(), size)) throw Kind(path + ": missing, or cannot be read");
  return content;
}

class Bundle {
 public:
  /// Verify the signature, then read the manifest and the vocabulary.
  /// @throws BundleError if the files are not a bundle or are damaged.
  /// @throws SignatureError if none of the accepted keys signed the manifest.
  explicit Bundle(Location location, const std::optional<Demanded>& demanded = std::nullopt) : location_(std::move(location)) {
    const std::string content = read(kManifest);
    if (demanded) check(content, *demanded);
    json_ = Json::parse(content, path(kManifest));
    manifest_ = Manifest::of(json_);
    vocabulary_ = Vocabulary::parse(verified(kTokens), path(kTokens), manifest_.vocab_size);
  }

  bool has(const std::string& name) const { return json_["files"].has(name); }  ///< whether the manifest lists a file

  /// Path of a file of the bundle, or only the file's name if the bundle has no folder.
  std::string path(const std::string& name) const {
    const std::string* const folder = std::get_if<std::string>(&location_);
    return folder && !folder->empty() ? *folder + "/" + name : name;
  }

  /// Return the content of a file after comparing its size and SHA-256 with the manifest. The file is read only once.
  /// @throws BundleError if the file is not listed or cannot be read.
  /// @throws IntegrityError if the file does not match the manifest.
  std::string verified(const std::string& name) const {
    const Json& digest = json_["files"][name];
    std::string content = read(name);
    if (static_cast<double>(content.size()) != digest["size"].number()) {
      throw IntegrityError(path(name) + ": size is " + std::to_string(content.size()) + " bytes, expected " +
                           std::to_string(static_cast<long long>(digest["size"].number(0, 1e15))));
    }
    const std::string found = hex_of(sha256(content));
    if (found != digest["sha256"].string()) {
      throw IntegrityError(path(name) + ": sha256 is " + found + ", expected " + digest["sha256"].string());
    }
    return content;
  }

  /// Compare every file with its digest.
  /// @throws BundleError, IntegrityError as for `verified`.
  void verify() const {
    for (const auto& [name, digest] : json_["files"].object()) verified(name);
  }

  /// Return the bundle's hotwords, or null if it has none.
  /// @throws BundleError if the vocabulary cannot spell the hotwords.
  std::shared_ptr<const ContextGraph> hotwords() const {
    if (manifest_.hotwords.empty()) return nullptr;
    try {
      const std::vector<Hotword> phrases = parse_hotwords(manifest_.hotwords);
      return std::make_shared<const ContextGraph>(phrases, vocabulary_);
    } catch (const InvalidArgument& error) {
      throw BundleError(path(kManifest) + ": decoding: hotwords: " + error.what());
    }
  }

  /// Return the bundle's language model, or null if it has none.
  /// @throws LanguageModelError if the language model is damaged or does not match the vocabulary.
  std::shared_ptr<const Fusion> language_model() const {
    const std::string& name = manifest_.language_model;
    if (name.empty()) return nullptr;
    auto fusion = std::make_shared<const Fusion>(Ngrams::parse(verified(name), path(name)), manifest_.weights, vocabulary_, path(name));
    fusion->check_words(path(kManifest) + ": decoding: language_model");
    return fusion;
  }

  const Manifest& manifest() const { return manifest_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  static constexpr const char* kManifest = "bundle.json";
  static constexpr const char* kTokens = "tokens.txt";

  void check(const std::string& manifest, const Demanded& demanded) const try {
    Signatures(read(kSignatureFile), demanded.public_keys, path(kSignatureFile)).check(manifest, demanded.verify);
  } catch (const BundleError& error) {
    throw SignatureError(error.what());
  }

  std::string read(const std::string& name) const {
    const auto* files = std::get_if<1>(&location_);
    if (!files) return content_of<BundleError>(path(name));
    const auto found = files->find(name);
    if (found == files->end()) throw BundleError(name + ": is not among the files in memory");
    return found->second;
  }

  Location location_;
  Json json_;
  Manifest manifest_;
  Vocabulary vocabulary_;
};

}  // namespace u2moe::runtime
