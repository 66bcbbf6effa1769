#include "ort.hpp"

#include <algorithm>
#include <functional>
#include <mutex>
#include <new>
#include <numeric>

#include "errors.hpp"

namespace u2moe::runtime::ort {
namespace {

#ifdef __GLIBC__
// An exception that leaves std::call_once, as in onnxruntime when memory is short, needs a library that glibc loads at the first
// one, and without memory for it glibc ends the program. So the first one is thrown while there is memory: when this is loaded.
[[maybe_unused]] const bool kUnwinds = [] {
  try {
    std::once_flag once;
    std::call_once(once, [] { throw false; });
  } catch (bool) {
  }
  return true;
}();
#endif

constexpr std::uint32_t kApiVersion = 18;  // of which AddExternalInitializersFromFilesInMemory is

template <class T>
Owned<OrtValue> tensor_of(std::vector<T>& data, const Shape& shape, ONNXTensorElementDataType type) {
  static const Owned<OrtMemoryInfo> memory = made<OrtMemoryInfo>(api().CreateCpuMemoryInfo, OrtArenaAllocator, OrtMemTypeDefault);
  return made<OrtValue>(api().CreateTensorWithDataAsOrtValue, memory.get(), data.data(), data.size() * sizeof(T), shape.data(),
                        shape.size(), type);
}

template <class T>
std::vector<T> numbers_of(const OrtValue& value) {
  const std::size_t num = count(shape_of(value));
  void* data = nullptr;
  check(api().GetTensorMutableData(const_cast<OrtValue*>(&value), &data));
  const T* first = static_cast<const T*>(data);
  return num ? std::vector<T>(first, first + num) : std::vector<T>();
}

Shape sizes(const OrtTensorTypeAndShapeInfo* info) {
  std::size_t num = 0;
  check(api().GetDimensionsCount(info, &num));
  Shape shape(num);
  check(api().GetDimensions(info, shape.data(), num));
  return shape;
}

// A text that onnxruntime has allocated, or "".
std::string taken(OrtAllocator* allocator, char* text) {
  const std::string copy = text ? text : "";
  if (text) check(api().AllocatorFree(allocator, text));
  return copy;
}

OrtAllocator* allocator() {
  OrtAllocator* found = nullptr;
  check(api().GetAllocatorWithDefaultOptions(&found));
  return found;
}

template <class Count, class Name>
std::vector<std::string> names(const OrtSession& session, Count count, Name name) {
  std::size_t num = 0;
  check(count(&session, &num));
  std::vector<std::string> found;
  for (std::size_t i = 0; i < num; ++i) {
    char* text = nullptr;
    check(name(&session, i, allocator(), &text));
    found.push_back(taken(allocator(), text));
  }
  return found;
}

}  // namespace

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(kApiVersion);
  if (!found) throw ProviderError("onnxruntime is " + version() + ", 1.18 or newer is needed");
  return *found;
}

std::string version() { return OrtGetApiBase()->GetVersionString(); }

Owned<OrtEnv> environment() {
  auto made_here = made<OrtEnv>(api().CreateEnv, ORT_LOGGING_LEVEL_FATAL, "u2moe");
  check(api().DisableTelemetryEvents(made_here.get()));
  return made_here;
}

void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  if (message.find("bad_alloc") != message.npos || message.find("Failed to allocate memory") != message.npos) throw std::bad_alloc();
  throw Failure(message.substr(0, std::min<std::size_t>(message.find('\n'), 300)));
}

Owned<OrtValue> tensor(std::vector<float>& data, const Shape& shape) {
  return tensor_of(data, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

Owned<OrtValue> tensor(std::vector<std::int64_t>& data, const Shape& shape) {
  return tensor_of(data, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
}

Shape shape_of(const OrtValue& value) {
  return sizes(made<OrtTensorTypeAndShapeInfo>(api().GetTensorTypeAndShape, &value).get());
}

Shape input_shape(const OrtSession& session, std::size_t index) {
  const auto type = made<OrtTypeInfo>(api().SessionGetInputTypeInfo, &session, index);
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().CastTypeInfoToTensorInfo(type.get(), &info));
  Shape shape = info ? sizes(info) : Shape();
  for (std::int64_t& size : shape) size = std::max<std::int64_t>(size, 1);
  return shape;
}

std::size_t count(const Shape& shape) {
  return static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()));
}

Values run(OrtSession& session, const std::vector<std::string>& inputs, const Values& values, const std::vector<std::string>& outputs) {
  std::vector<const char*> names, wanted;
  std::vector<const OrtValue*> feeds;
  for (const std::string& name : inputs) names.push_back(name.c_str());
  for (const std::string& name : outputs) wanted.push_back(name.c_str());
  for (const auto& value : values) feeds.push_back(value.get());
  std::vector<OrtValue*> found(wanted.size());
  check(api().Run(&session, nullptr, names.data(), feeds.data(), feeds.size(), wanted.data(), wanted.size(), found.data()));
  return Values(found.begin(), found.end());
}

std::vector<float> floats_of(const OrtValue& value) { return numbers_of<float>(value); }

std::vector<std::int64_t> integers_of(const OrtValue& value) { return numbers_of<std::int64_t>(value); }

std::vector<std::string> input_names(const OrtSession& session) {
  return names(session, api().SessionGetInputCount, api().SessionGetInputName);
}

std::vector<std::string> output_names(const OrtSession& session) {
  return names(session, api().SessionGetOutputCount, api().SessionGetOutputName);
}

std::string metadata(const OrtModelMetadata& metadata, const std::string& key) {
  char* text = nullptr;
  check(api().ModelMetadataLookupCustomMetadataMap(&metadata, allocator(), key.c_str(), &text));
  return taken(allocator(), text);
}

std::vector<std::string> available_providers() {
  char** names = nullptr;
  int num = 0;
  check(api().GetAvailableProviders(&names, &num));
  std::vector<std::string> found(names, names + num);
  check(api().ReleaseAvailableProviders(names, num));
  return found;
}

}  // namespace u2moe::runtime::ort
