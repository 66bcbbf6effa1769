// Where and how graphs run: execution providers, threads, kernels.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "json.hpp"
#include "ort.hpp"

namespace u2moe::runtime {

struct Provider {
  std::string name;
  std::vector<std::pair<std::string, std::string>> options;
};

/// Native kernels, as they describe themselves; without any, why.
struct Kernels {
  bool native = false;
  std::string isa;
  int layout = 0;  ///< of packed weights
  std::string reason;
};

/// Checked when it is made.
class Settings {
 public:
  /// @param kernels "native", "onnxruntime" or "auto"; "": the environment variable U2MOE_KERNELS, or "auto".
  /// @param options of the caller, used unchanged; null: our own.
  /// @throws InvalidArgument a value is out of range, or excludes another.
  /// @throws ProviderError a provider is not in this onnxruntime.
  /// @throws KernelsError native kernels were asked for, and cannot run.
  Settings(int num_threads, std::string kernels, std::vector<Provider> providers, const OrtSessionOptions* options);

  /// Options for a session.
  /// @throws ort::Failure a provider does not start.
  ort::Owned<OrtSessionOptions> session_options(bool native) const;

  const Kernels& kernels() const { return kernels_; }
  const std::string& wanted_kernels() const { return wanted_; }
  const std::vector<Provider>& providers() const { return providers_; }
  bool are_of_the_caller() const { return caller_ != nullptr; }
  bool is_cpu() const;

 private:
  int num_threads_;
  std::string wanted_;
  std::vector<Provider> providers_;
  ort::Owned<OrtSessionOptions> caller_;
  Kernels kernels_;
};

}  // namespace u2moe::runtime
