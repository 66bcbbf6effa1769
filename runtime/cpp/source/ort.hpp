// onnxruntime's C API with owners and exceptions. Asks for the API of 1.18, whatever the header's version is.
#pragma once

#ifdef __MINGW32__  // which lacks this one of Microsoft's annotations
#define _Return_type_success_(result)
#endif
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace u2moe::runtime::ort {

/// @throws ProviderError onnxruntime is older than 1.18.
const OrtApi& api();

std::string version();

/// What onnxruntime says; callers make it an error with a file's name.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// @throws Failure the status is an error.
void check(OrtStatus* status);

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

/// What a function of the API creates.
template <class T, class Create, class... Arguments>
Owned<T> made(Create create, Arguments... arguments) {
  T* created = nullptr;
  check(create(arguments..., &created));
  return Owned<T>(created);
}

/// With no log and no telemetry: errors are thrown, and need not be printed as well.
Owned<OrtEnv> environment();

using Shape = std::vector<std::int64_t>;
using Values = std::vector<Owned<OrtValue>>;

/// Elements of a tensor.
std::size_t count(const Shape& shape);

/// A view of `data`, which must live as long.
Owned<OrtValue> tensor(std::vector<float>& data, const Shape& shape);
Owned<OrtValue> tensor(std::vector<std::int64_t>& data, const Shape& shape);

Shape shape_of(const OrtValue& value);
std::vector<float> floats_of(const OrtValue& value);
std::vector<std::int64_t> integers_of(const OrtValue& value);

/// Outputs for inputs, both in the order of their names.
Values run(OrtSession& session, const std::vector<std::string>& inputs, const Values& values, const std::vector<std::string>& outputs);

/// Sizes of an input; 1 where any is allowed.
Shape input_shape(const OrtSession& session, std::size_t index);
std::vector<std::string> input_names(const OrtSession& session);
std::vector<std::string> output_names(const OrtSession& session);
/// The text of a metadata key; "" if there is none.
std::string metadata(const OrtModelMetadata& metadata, const std::string& key);
std::vector<std::string> available_providers();

}  // namespace u2moe::runtime::ort
