// Execution providers, threads and kernels of the graphs.
#pragma once

#include <thread>

#include "json.hpp"
#include "ort.hpp"

#ifdef U2MOE_KERNELS_REGISTER
extern "C" OrtStatus* U2MOE_KERNELS_REGISTER(OrtSessionOptions* options, const OrtApiBase* base);
extern "C" std::size_t u2moe_kernels_describe(char* text, std::size_t size);
#endif

namespace u2moe::runtime {

struct Provider {
  std::string name;
  std::vector<std::pair<std::string, std::string>> options;
};

/// The calling program's function that runs `static.onnx`; see u2moe_runner.
using Runner = std::function<int(const std::vector<u2moe_tensor>& inputs, const std::vector<u2moe_tensor>& outputs)>;

/// Native kernels of a graph, or the reason why they are not used.
struct Kernels {
  bool native = false;
  std::string isa;
  int layout = 0;  ///< of packed weights
  std::string reason;
  std::set<std::string> operators = {};              ///< graph functions that native kernels replace
  std::map<std::string, std::string> refused = {};   ///< functions that native kernels cannot run, with the reasons

  /// If an error of onnxruntime names a function that native kernels do not support, add the function to `refused`. Return
  /// false if the error names no such function, or if the function is already refused.
  bool leave_out(const std::string& error) {
    for (std::size_t end = error.find(": "); end != error.npos; end = error.find(": ", end + 1)) {
      const auto is_part = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
      std::size_t begin = end;
      while (begin > 0 && is_part(error[begin - 1])) --begin;
      const std::string name = error.substr(begin, end - begin);
      if (operators.count(name)) return refused.emplace(name, error.substr(end + 2, error.find('\n', end) - end - 2)).second;
    }
    return false;
  }
};

/// Execution providers, threads and kernels of the graphs, validated on construction.
class Settings {
 public:
  /// @param kernels "native", "onnxruntime" or "auto". If "", U2MOE_KERNELS in the environment applies, or "auto" if unset.
  /// @param options session options of the caller, used unchanged; null: options are made from the other arguments.
  /// @throws InvalidArgument if an argument is out of range or conflicts with another.
  /// @throws ProviderError if this onnxruntime lacks a provider.
  /// @throws KernelsError if native kernels are required and cannot run.
  Settings(int num_threads, std::string kernels, std::vector<Provider> providers, const OrtSessionOptions* options)
      : num_threads_(num_threads), wanted_(std::move(kernels)), providers_(std::move(providers)) {
    const int most = static_cast<int>(std::max(32U, 4 * std::thread::hardware_concurrency()));
    if (num_threads < 1 || num_threads > most) {
      throw InvalidArgument("num_threads must be from 1 to " + std::to_string(most) + " on this machine, got " + std::to_string(num_threads));
    }
    const char* variable = std::getenv("U2MOE_KERNELS");
    if (wanted_.empty()) wanted_ = variable && *variable ? variable : "auto";
    if (wanted_ != "auto" && wanted_ != "native" && wanted_ != "onnxruntime") {
      throw InvalidArgument("kernels must be auto, native or onnxruntime, got '" + wanted_ + "'");
    }
    if (providers_.empty()) providers_.push_back({kCpu, {}});
    const std::vector<std::string> available = ort::available_providers();
    for (const auto& [name, own] : providers_) {
      if (name == kCpu && !own.empty()) throw InvalidArgument(name + " takes no options, got '" + own[0].first + "'");
      if (std::count(available.begin(), available.end(), name)) continue;
      throw ProviderError(name + " is not in this onnxruntime (" + ort::version() + "), which has " + joined(available, ", "));
    }
    if (!options) {
      kernels_ = chosen(wanted_, is_cpu());
      return;
    }
    if (num_threads != 1 || wanted_ == "native" || !is_cpu()) {
      throw InvalidArgument("session_options cannot be combined with num_threads, native kernels or providers: set them in session_options");
    }
    caller_ = ort::made<OrtSessionOptions>(ort::api().CloneSessionOptions, options);
    kernels_.reason = "session_options are those of the caller";
  }

  /// Return session options for these kernels.
  /// @throws ProviderError if a provider does not start.
  ort::Owned<OrtSessionOptions> session_options(const Kernels& kernels) const {
    const OrtApi& api = ort::api();
    if (caller_) return ort::made<OrtSessionOptions>(api.CloneSessionOptions, static_cast<const OrtSessionOptions*>(caller_.get()));
    auto options = ort::made<OrtSessionOptions>(api.CreateSessionOptions);
    ort::check(api.SetIntraOpNumThreads(options.get(), num_threads_));
    ort::check(api.SetInterOpNumThreads(options.get(), 1));
    ort::check(api.DisableMemPattern(options.get()));  // shapes change from chunk to chunk
    ort::check(api.AddSessionConfigEntry(options.get(), "session.force_spinning_stop", "1"));
    for (const Provider& provider : providers_) append(options.get(), provider);
    const std::string without = joined(kernels.refused, ",", [](const auto& each) { return each.first; });
    if (!without.empty()) ort::check(api.AddSessionConfigEntry(options.get(), "u2moe.without", without.c_str()));
#ifdef U2MOE_KERNELS_REGISTER
    if (kernels.native) ort::check(U2MOE_KERNELS_REGISTER(options.get(), OrtGetApiBase()));
#endif
    return options;
  }

  /// Return these settings for a graph that runs on the CPU: without providers, session options of the caller and runner.
  Settings on_cpu() const { return {num_threads_, wanted_, {}, nullptr}; }

  const Kernels& kernels() const { return kernels_; }
  const std::string& wanted_kernels() const { return wanted_; }
  const std::vector<Provider>& providers() const { return providers_; }
  bool are_of_the_caller() const { return caller_ != nullptr; }

  Runner runner;  ///< empty: onnxruntime runs `static.onnx`

  bool is_cpu() const { return providers_.size() == 1 && providers_[0].name == kCpu; }

 private:
  static constexpr const char* kCpu = "CPUExecutionProvider";

#ifdef U2MOE_KERNELS_REGISTER
  static Kernels built_in() {
    std::string text(u2moe_kernels_describe(nullptr, 0), '\0');
    u2moe_kernels_describe(text.data(), text.size());
    if (!text.empty()) text.pop_back();
    const Json found = Json::parse(text, "native kernels");
    if (found.has("error")) throw KernelsError(found["error"].string());
    if (found["contract"].integer(0, 1000) != kKernelsContract) {
      throw KernelsError("native kernels have another version: build this library with the kernels of the same u2moe version");
    }
    Kernels kernels{true, found["isa"].string(), found["layout"].integer(0, 1000), ""};
    for (const Json& name : found["operators"].array()) kernels.operators.insert(name.string());
    return kernels;
  }
#else
  static Kernels built_in() { throw KernelsError("this library was built without native kernels: build it with -DU2MOE_KERNELS=ON"); }
#endif

  static void append(OrtSessionOptions* options, const Provider& provider) try {
    if (provider.name == kCpu) return;  // onnxruntime always appends the CPU provider last
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : provider.options) {
      keys.push_back(key.c_str());
      values.push_back(value.c_str());
    }
    const OrtApi& api = ort::api();
    if (provider.name == "CUDAExecutionProvider") {
      const auto cuda = ort::made<OrtCUDAProviderOptionsV2>(api.CreateCUDAProviderOptions);
      ort::check(api.UpdateCUDAProviderOptions(cuda.get(), keys.data(), values.data(), keys.size()));
      ort::check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()));
      return;
    }
    // onnxruntime's generic function takes names without "ExecutionProvider", in some cases spelled differently.
    static const std::map<std::string, std::string> others = {
        {"Azure", "AZURE"}, {"Dml", "DML"}, {"WebGpu", "WebGPU"}, {"WebNN", "WEBNN"}, {"Xnnpack", "XNNPACK"}};
    std::string name = provider.name.substr(0, provider.name.rfind("ExecutionProvider"));
    if (const auto other = others.find(name); other != others.end()) name = other->second;
    ort::check(api.SessionOptionsAppendExecutionProvider(options, name.c_str(), keys.data(), values.data(), keys.size()));
  } catch (const ort::Failure& error) {
    throw ProviderError(provider.name + " does not start: " + error.what());
  }

  static Kernels chosen(const std::string& wanted, bool is_cpu) {
    if (wanted == "onnxruntime") return {false, "", 0, "as requested"};
    try {
      if (!is_cpu) throw KernelsError("native kernels run only on the CPU");
      return built_in();
    } catch (const KernelsError& error) {
      if (wanted == "native") throw;
      return {false, "", 0, error.what()};
    }
  }

  int num_threads_;
  std::string wanted_;
  std::vector<Provider> providers_;
  ort::Owned<OrtSessionOptions> caller_;
  Kernels kernels_;
};

}  // namespace u2moe::runtime
