#include "files.hpp"

#include <fstream>
#include <utility>

#include "errors.hpp"

#ifdef _WIN32
#include <filesystem>
#endif

namespace u2moe::runtime {

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

Files Files::in(const std::string& folder) {
  Files files;
  files.folder_ = folder;
  return files;
}

Files Files::of(std::map<std::string, std::string> contents) {
  Files files;
  files.contents_ = std::move(contents);
  files.is_memory_ = true;
  return files;
}

std::string Files::path(const std::string& name) const { return is_memory_ ? name : folder_ + "/" + name; }

std::string Files::read(const std::string& name) const {
  std::string content;
  if (is_memory_) {
    const auto found = contents_.find(name);
    if (found == contents_.end()) throw BundleError(name + ": is not among the files in memory");
    return found->second;
  }
  if (!read_file(path(name), content)) throw BundleError(path(name) + ": missing, or cannot be read");
  return content;
}

}  // namespace u2moe::runtime
