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
