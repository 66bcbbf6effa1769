#include "bundle.hpp"

#include <utility>

#include "errors.hpp"
#include "sha256.hpp"

namespace u2moe::runtime {
namespace {

constexpr const char* kManifest = "bundle.json";
constexpr const char* kTokens = "tokens.txt";

}  // namespace

Bundle::Bundle(Files files) : files_(std::move(files)) {
  json_ = Json::parse(files_.read(kManifest), path(kManifest));
  manifest_ = Manifest::of(json_);
  vocabulary_ = Vocabulary::parse(verified(kTokens), path(kTokens));
  if (vocabulary_.size() != static_cast<std::size_t>(manifest_.vocab_size)) {
    throw BundleError(path(kTokens) + ": has " + std::to_string(vocabulary_.size()) + " symbols, expected vocab_size " +
                      std::to_string(manifest_.vocab_size));
  }
}

std::shared_ptr<const ContextGraph> Bundle::hotwords() const {
  if (manifest_.hotwords.empty()) return nullptr;
  try {
    const std::vector<Hotword> phrases = parse_hotwords(manifest_.hotwords);
    return std::make_shared<const ContextGraph>(phrases, vocabulary_);
  } catch (const InvalidArgument& error) {
    throw BundleError(path(kManifest) + ": decoding: hotwords: " + error.what());
  }
}

std::shared_ptr<const Fusion> Bundle::language_model() const {
  const std::string& name = manifest_.language_model;
  if (name.empty()) return nullptr;
  auto fusion = std::make_shared<const Fusion>(Ngrams::parse(verified(name), path(name)), manifest_.weights, vocabulary_, path(name));
  fusion->check_words(path(kManifest) + ": decoding: language_model");
  return fusion;
}

std::string Bundle::verified(const std::string& name) const {
  const Json& digest = json_["files"][name];
  std::string content = files_.read(name);
  if (static_cast<double>(content.size()) != digest["size"].number()) {
    throw IntegrityError(path(name) + ": size is " + std::to_string(content.size()) + " bytes, expected " +
                         std::to_string(static_cast<long long>(digest["size"].number(0, 1e15))));
  }
  const std::string found = sha256_hex(content);
  if (found != digest["sha256"].string()) {
    throw IntegrityError(path(name) + ": sha256 is " + found + ", expected " + digest["sha256"].string());
  }
  return content;
}

}  // namespace u2moe::runtime
