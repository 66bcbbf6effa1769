#include "bundle.hpp"

#include <fstream>
#include <utility>

#include "errors.hpp"
#include "sha256.hpp"

#ifdef _WIN32
#include <filesystem>
#endif

namespace u2moe::runtime {
namespace {

constexpr const char* kManifest = "bundle.json";
constexpr const char* kTokens = "tokens.txt";

}  // namespace

bool read_file(const std::string& path, std::string& content) {
#ifdef _WIN32
  std::ifstream file(std::filesystem::u8path(path), std::ios::binary | std::ios::ate);
#else
  std::ifstream file(path, std::ios::binary | std::ios::ate);
#endif
  constexpr std::streamoff largest = std::streamoff{1} << 40;  // a folder has more
  const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (size < 0 || size > largest) return false;
  content.resize(static_cast<std::size_t>(size));
  file.seekg(0);
  return static_cast<bool>(file.read(content.data(), size));
}

Bundle::Bundle(Location location) : location_(std::move(location)) {
  json_ = Json::parse(read(kManifest), path(kManifest));
  manifest_ = Manifest::of(json_);
  vocabulary_ = Vocabulary::parse(verified(kTokens), path(kTokens));
  if (vocabulary_.size() != static_cast<std::size_t>(manifest_.vocab_size)) {
    throw BundleError(path(kTokens) + ": has " + std::to_string(vocabulary_.size()) + " symbols, expected vocab_size " +
                      std::to_string(manifest_.vocab_size));
  }
}

std::string Bundle::path(const std::string& name) const {
  const std::string* const folder = std::get_if<std::string>(&location_);
  return folder ? *folder + "/" + name : name;
}

std::string Bundle::read(const std::string& name) const {
  std::string content;
  if (const auto* files = std::get_if<1>(&location_)) {
    const auto found = files->find(name);
    if (found == files->end()) throw BundleError(name + ": is not among the files in memory");
    return found->second;
  }
  if (!read_file(path(name), content)) throw BundleError(path(name) + ": missing, or cannot be read");
  return content;
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
  std::string content = read(name);
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
