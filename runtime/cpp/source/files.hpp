// The files of a bundle: in a folder, or in memory.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace u2moe::runtime {

class Files {
 public:
  static Files in(const std::string& folder);
  static Files of(std::map<std::string, std::string> contents);

  /// What messages call a file.
  std::string path(const std::string& name) const;

  /// @throws BundleError it is missing, or cannot be read.
  std::string read(const std::string& name) const;

 private:
  std::string folder_;
  std::map<std::string, std::string> contents_;
  bool is_memory_ = false;
};

/// The content of a file; `none` if it cannot be read.
bool read_file(const std::string& path, std::string& content);

}  // namespace u2moe::runtime
