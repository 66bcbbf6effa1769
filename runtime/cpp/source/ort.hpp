// Ownership and exceptions for onnxruntime's C API. The API version is 18, whatever the version of the header.
#pragma once

#ifdef __MINGW32__  // MinGW lacks this annotation of Microsoft's compiler
#define _Return_type_success_(result)
#endif
#include <onnxruntime_c_api.h>

#include <mutex>
#include <new>
#include "errors.hpp"

namespace u2moe::runtime {

/// Passes log messages of the library and of onnxruntime to the program's callback. Without a callback they are discarded. When
/// `set` returns, the previous callback is not running and will not be called again.
class Log {
 public:
  static Log& all() {
    static Log* const only = new Log;  // never destroyed: threads may outlive `main`
    return *only;
  }

  void set(u2moe_log_callback callback, void* context) {
    const std::lock_guard<std::recursive_mutex> lock(used_);
    callback_ = callback;
    context_ = context;
  }

  void write(int severity, const char* origin, const std::string& message) {
    const std::lock_guard<std::recursive_mutex> lock(used_);
    if (callback_) callback_(context_, severity, origin, message.c_str());
  }

 private:
  std::recursive_mutex used_;
  u2moe_log_callback callback_ = nullptr;
  void* context_ = nullptr;
};

namespace ort {

#ifdef __GLIBC__
// glibc loads a library when an exception first leaves std::call_once, as in onnxruntime when memory is short. Without memory
// for the library, glibc ends the program. So throw an exception out of std::call_once when this code is loaded.
[[maybe_unused]] inline const bool kUnwinds = [] {
  try {
    std::once_flag once;
    std::call_once(once, [] { throw false; });
  } catch (bool) {
  }
  return true;
}();
#endif

inline std::string version() { return OrtGetApiBase()->GetVersionString(); }

/// @throws ProviderError if onnxruntime is older than 1.18.
inline const OrtApi& api() {
  constexpr std::uint32_t wanted = 18;  // first version with AddExternalInitializersFromFilesInMemory
  static const OrtApi* const found = OrtGetApiBase()->GetApi(wanted);
  if (!found) throw ProviderError("onnxruntime is " + version() + ", expected 1.18 or newer");
  return *found;
}

/// An error of onnxruntime. `what` is the first line, up to 300 bytes, of `whole`. Callers add the name of a file or provider.
struct Failure : std::runtime_error {
  explicit Failure(const std::string& all) : std::runtime_error(all.substr(0, std::min<std::size_t>(all.find('\n'), 300))), whole(all) {}
  std::string whole;
};

/// @throws Failure if the status is an error.
inline void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  if (message.find("bad_alloc") != message.npos || message.find("Failed to allocate memory") != message.npos) throw std::bad_alloc();
  throw Failure(message);
}

struct Release {
  void operator()(OrtEnv* it) const { api().ReleaseEnv(it); }
  void operator()(OrtSession* it) const { api().ReleaseSession(it); }
  void operator()(OrtSessionOptions* it) const { api().ReleaseSessionOptions(it); }
  void operator()(OrtValue* it) const { api().ReleaseValue(it); }
  void operator()(OrtMemoryInfo* it) const { api().ReleaseMemoryInfo(it); }
  void operator()(OrtModelMetadata* it) const { api().ReleaseModelMetadata(it); }
  void operator()(OrtTypeInfo* it) const { api().ReleaseTypeInfo(it); }
  void operator()(OrtTensorTypeAndShapeInfo* it) const { api().ReleaseTensorTypeAndShapeInfo(it); }
  void operator()(OrtCUDAProviderOptionsV2* it) const { api().ReleaseCUDAProviderOptions(it); }
};

template <class T>
using Owned = std::unique_ptr<T, Release>;

/// Return the object that a function of the API creates.
template <class T, class Create, class... Arguments>
Owned<T> made(Create create, Arguments... arguments) {
  T* created = nullptr;
  check(create(arguments..., &created));
  return Owned<T>(created);
}

/// Create an environment that logs to `Log` instead of stderr and has telemetry disabled.
inline Owned<OrtEnv> environment() {
  const OrtLoggingFunction write = [](void*, OrtLoggingLevel level, const char* category, const char*, const char* where, const char* message) {
    Log::all().write(level, category, std::string(where) + ": " + message);
  };
  auto made_here = made<OrtEnv>(api().CreateEnvWithCustomLogger, write, nullptr, ORT_LOGGING_LEVEL_WARNING, "u2moe");
  check(api().DisableTelemetryEvents(made_here.get()));
  return made_here;
}

using Shape = std::vector<std::int64_t>;
using Values = std::vector<Owned<OrtValue>>;

/// Number of elements of a tensor.
inline std::size_t count(const Shape& shape) {
  return static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()));
}

/// onnxruntime's name for float or std::int64_t.
template <class T>
constexpr auto kType = std::is_same_v<T, float> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

/// Create a tensor that is a view of `data` (float or std::int64_t). `data` must outlive the tensor.
template <class T>
Owned<OrtValue> tensor(std::vector<T>& data, const Shape& shape) {
  static const Owned<OrtMemoryInfo> memory = made<OrtMemoryInfo>(api().CreateCpuMemoryInfo, OrtArenaAllocator, OrtMemTypeDefault);
  return made<OrtValue>(api().CreateTensorWithDataAsOrtValue, memory.get(), data.data(), data.size() * sizeof(T), shape.data(), shape.size(), kType<T>);
}

/// Create a float tensor that owns its data.
inline Owned<OrtValue> own_tensor(const Shape& shape) {
  OrtAllocator* allocator = nullptr;
  check(api().GetAllocatorWithDefaultOptions(&allocator));
  return made<OrtValue>(api().CreateTensorAsOrtValue, allocator, shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

template <class... Tensors>
Values values(Tensors... tensors) {
  Values all;
  (all.push_back(std::move(tensors)), ...);
  return all;
}

/// Sizes of a tensor of T. Empty if the elements have another type.
template <class T>
Shape sizes(const OrtTensorTypeAndShapeInfo* info) {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  check(api().GetTensorElementType(info, &type));
  std::size_t num = 0;
  check(api().GetDimensionsCount(info, &num));
  Shape shape(type == kType<T> ? num : 0);
  check(api().GetDimensions(info, shape.data(), shape.size()));
  return shape;
}

template <class T>
Shape shape_of(const OrtValue& value) {
  return sizes<T>(made<OrtTensorTypeAndShapeInfo>(api().GetTensorTypeAndShape, &value).get());
}

template <class T>
T* data_of(OrtValue& value) {
  void* data = nullptr;
  check(api().GetTensorMutableData(&value, &data));
  return static_cast<T*>(data);
}
template <class T>
const T* data_of(const OrtValue& value) {
  return data_of<T>(const_cast<OrtValue&>(value));
}

template <class T>
std::vector<T> numbers_of(const OrtValue& value) {
  const T* first = data_of<T>(value);
  return {first, first + count(shape_of<T>(value))};
}

/// Run a session. `values` are in the order of `inputs`, and the results in the order of `outputs`.
inline Values run(OrtSession& session, const std::vector<std::string>& inputs, const Values& values, const std::vector<std::string>& outputs) {
  std::vector<const char*> names, wanted;
  std::vector<const OrtValue*> feeds;
  for (const std::string& name : inputs) names.push_back(name.c_str());
  for (const std::string& name : outputs) wanted.push_back(name.c_str());
  for (const auto& value : values) feeds.push_back(value.get());
  std::vector<OrtValue*> found(wanted.size());
  check(api().Run(&session, nullptr, names.data(), feeds.data(), feeds.size(), wanted.data(), wanted.size(), found.data()));
  return Values(found.begin(), found.end());
}

/// Return whether integer products are wrong. onnxruntime 1.21 to 1.24 leave some of them unset on processors with AMX.
inline bool loses_products(const OrtEnv* env) {
  constexpr std::int32_t kRows = 64, kSame = 4, kColumns = 31;
  const Shape shape{kRows, kSame};
  const std::string graph =  // c = MatMulInteger(a, b), where b [kSame, kColumns] is 1 everywhere
      "\10\7B\2\20\r:\275\1\n\30\n\1a\n\1b\22\1c\"\rMatMulInteger\22\1gZ\t\n\1a\22\4\n\2\10\2b\t\n\1c\22\4\n\2\10\6*\207\1\10\4\10\37\20\3B\1bJ|" +
      std::string(kSame * kColumns, '\1');
  try {
    const auto options = made<OrtSessionOptions>(api().CreateSessionOptions);
    check(api().SetIntraOpNumThreads(options.get(), 1));
    const auto session =
        made<OrtSession>(api().CreateSessionFromArray, env, graph.data(), graph.size(), static_cast<const OrtSessionOptions*>(options.get()));
    OrtAllocator* allocator = nullptr;
    check(api().GetAllocatorWithDefaultOptions(&allocator));
    auto a = made<OrtValue>(api().CreateTensorAsOrtValue, allocator, shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
    std::fill_n(data_of<std::uint8_t>(*a), count(shape), std::uint8_t{1});
    const Values products = run(*session, {"a"}, values(std::move(a)), {"c"});
    const std::int32_t* const first = data_of<std::int32_t>(*products[0]);
    return std::any_of(first, first + kRows * kColumns, [](std::int32_t each) { return each != kSame; });
  } catch (const Failure&) {
    return false;  // a minimal build, which loads only graphs in ORT format and does not use AMX
  }
}

/// Shape of a float input, with 1 for each free dimension. Empty if the input has another type.
inline Shape input_shape(const OrtSession& session, std::size_t index) {
  const auto type = made<OrtTypeInfo>(api().SessionGetInputTypeInfo, &session, index);
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().CastTypeInfoToTensorInfo(type.get(), &info));
  Shape shape = info ? sizes<float>(info) : Shape();
  for (std::int64_t& size : shape) size = std::max<std::int64_t>(size, 1);
  return shape;
}

/// Return the text that a function of the API allocates, or "" if the function returns no text.
template <class Function, class... Arguments>
std::string text_of(Function function, Arguments... arguments) {
  OrtAllocator* allocator = nullptr;
  char* text = nullptr;
  check(api().GetAllocatorWithDefaultOptions(&allocator));
  check(function(arguments..., allocator, &text));
  const std::string copy = text ? text : "";
  if (text) check(api().AllocatorFree(allocator, text));
  return copy;
}

template <class Count, class Name>
std::vector<std::string> names(const OrtSession& session, Count count_of, Name name) {
  std::size_t num = 0;
  check(count_of(&session, &num));
  std::vector<std::string> found;
  for (std::size_t i = 0; i < num; ++i) found.push_back(text_of(name, &session, i));
  return found;
}

inline std::vector<std::string> input_names(const OrtSession& session) { return names(session, api().SessionGetInputCount, api().SessionGetInputName); }

inline std::vector<std::string> output_names(const OrtSession& session) { return names(session, api().SessionGetOutputCount, api().SessionGetOutputName); }

/// Value of a metadata key, or "" if it is missing.
inline std::string metadata(const OrtModelMetadata& metadata, const std::string& key) {
  const auto look_up = [&](OrtAllocator* allocator, char** text) { return api().ModelMetadataLookupCustomMetadataMap(&metadata, allocator, key.c_str(), text); };
  return text_of(look_up);
}

inline std::vector<std::string> available_providers() {
  char** names = nullptr;
  int num = 0;
  check(api().GetAvailableProviders(&names, &num));
  std::vector<std::string> found(names, names + num);
  check(api().ReleaseAvailableProviders(names, num));
  return found;
}

}  // namespace ort
}  // namespace u2moe::runtime
