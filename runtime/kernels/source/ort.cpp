#include "ort.h"

#include <cstdio>
#include <cstring>

#include "layout.h"

namespace u2moe {
namespace {

// API of the onnxruntime that last called this library in this thread. A process may contain several onnxruntimes.
thread_local const OrtApi* the_api = nullptr;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  return text + "]";
}

size_t bytes_of(ONNXTensorElementDataType type) {
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) return 8;
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 1;
}

// Returns whether numbers are aligned. Numbers that onnxruntime maps from a file may be unaligned.
bool is_aligned(const void* data, ONNXTensorElementDataType type) {
  return reinterpret_cast<uintptr_t>(data) % bytes_of(type) == 0;
}

struct TensorInfo {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  explicit TensorInfo(const OrtValue* value) { Api::check(Api::get().GetTensorTypeAndShape(value, &info)); }
  ~TensorInfo() { Api::get().ReleaseTensorTypeAndShapeInfo(info); }
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;
};

}  // namespace

void Api::use(const OrtApi* api) { the_api = api; }

const OrtApi& Api::get() { return *the_api; }

void Api::check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::unique_ptr<OrtStatus, void (*)(OrtStatus*)> owned(status, get().ReleaseStatus);
  throw Invalid(get().GetErrorMessage(status));
}

OrtStatus* Api::failed(const char* op, const char* message) noexcept {
  char text[512];
  std::snprintf(text, sizeof text, "%s: %s", op, message);
  return get().CreateStatus(ORT_INVALID_ARGUMENT, text);
}

size_t Tensor::size() const {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

size_t Tensor::rows() const {
  size_t count = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) count *= static_cast<size_t>(shape[i]);
  return count;
}

Tensor tensor_of(const OrtValue* value) {
  if (value == nullptr) throw Invalid("an input is missing");
  const OrtApi& api = Api::get();
  int is_tensor = 0;
  Api::check(api.IsTensor(value, &is_tensor));
  if (!is_tensor) throw Invalid("an input is not a tensor");
  Tensor tensor;
  const TensorInfo info(value);
  size_t count = 0;
  Api::check(api.GetDimensionsCount(info.info, &count));
  tensor.shape.resize(count);
  Api::check(api.GetDimensions(info.info, tensor.shape.data(), count));
  Api::check(api.GetTensorElementType(info.info, &tensor.type));
  void* data = nullptr;
  Api::check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

Node::Node(const OrtKernelInfo* info) : info_(info) {
  Api::check(Api::get().KernelInfo_GetInputCount(info, &num_inputs_));
}

int64_t Node::integer(const char* name, int64_t least, int64_t most) const {
  int64_t value = 0;
  Api::check(Api::get().KernelInfoGetAttribute_int64(info_, name, &value));
  if (value < least || value > most)
    throw Invalid(std::string("attribute ") + name + " must be from " + std::to_string(least) + " to " +
                  std::to_string(most) + ", got " + std::to_string(value));
  return value;
}

float Node::number(const char* name, float least, float most) const {
  float value = 0;
  Api::check(Api::get().KernelInfoGetAttribute_float(info_, name, &value));
  if (!(value >= least && value <= most))
    throw Invalid(std::string("attribute ") + name + " must be from " + std::to_string(least) + " to " +
                  std::to_string(most) + ", got " + std::to_string(value));
  return value;
}

std::string Node::name() const {
  size_t size = 0;
  Api::check(Api::get().KernelInfo_GetNodeName(info_, nullptr, &size));
  std::string name(size, '\0');
  Api::check(Api::get().KernelInfo_GetNodeName(info_, name.data(), &size));
  return name;
}

std::string Node::text(const char* name) const {
  size_t size = 0;
  Api::check(Api::get().KernelInfoGetAttribute_string(info_, name, nullptr, &size));
  if (size > 256) throw Invalid(std::string("attribute ") + name + " is too long");
  std::string text(size, '\0');
  Api::check(Api::get().KernelInfoGetAttribute_string(info_, name, text.data(), &size));
  text.resize(size);
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

void Node::pair(const char* name, int64_t most, size_t (&values)[2]) const {
  int64_t found[2] = {};
  size_t count = 2;
  Api::check(Api::get().KernelInfoGetAttributeArray_int64(info_, name, nullptr, &count));
  if (count == 2) Api::check(Api::get().KernelInfoGetAttributeArray_int64(info_, name, found, &count));
  for (size_t i = 0; i < 2; i++) {
    if (count != 2 || found[i] < 1 || found[i] > most)
      throw Invalid(std::string("attribute ") + name + " must be two numbers from 1 to " + std::to_string(most));
    values[i] = static_cast<size_t>(found[i]);
  }
}

bool Node::has(const char* attribute) const {
  int64_t value = 0;
  OrtStatus* status = Api::get().KernelInfoGetAttribute_int64(info_, attribute, &value);
  if (status == nullptr) return true;
  Api::get().ReleaseStatus(status);
  return false;
}

Weights Node::packed(size_t bytes) {
  const auto* data = constant<uint8_t>("packed weights", {static_cast<int64_t>(bytes)});
  if (reinterpret_cast<uintptr_t>(data) % kLine != 0) {
    Weights copied(bytes);
    std::memcpy(copied.data(), data, bytes);
    return copied;
  }
  constants_.pop_back();  // not given back, since the packed weights are used in place
  return Weights(data);
}

const void* Node::next(const char* what, ONNXTensorElementDataType type, const std::vector<int64_t>& shape,
                       std::vector<int64_t>* found) {
  const std::string where = std::string("input ") + std::to_string(next_) + " (" + what + ")";
  if (next_ >= num_inputs_) throw Invalid(where + " is missing");
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Api::check(Api::get().KernelInfoGetConstantInput_tensor(info_, next_, &is_constant, &value));
  if (!is_constant || value == nullptr) throw Invalid(where + " must be a constant");
  const Tensor tensor = tensor_of(value);
  bool fits = tensor.type == type && tensor.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++)
    fits = shape[i] < 0 ? tensor.shape[i] > 0 : tensor.shape[i] == shape[i];
  if (!fits)
    throw Invalid(where + " must be of element type " + std::to_string(type) + " and shape " + shape_text(shape) +
                  ", got type " + std::to_string(tensor.type) + " and " + shape_text(tensor.shape));
  next_++;
  constants_.emplace_back(tensor.data, tensor.size() * bytes_of(type));
  if (found != nullptr) *found = tensor.shape;
  if (is_aligned(tensor.data, type)) return tensor.data;
  const size_t bytes = tensor.size() * bytes_of(type);
  aligned_.emplace_back(bytes);
  std::memcpy(aligned_.back().data(), tensor.data, bytes);
  return aligned_.back().data();
}

Tensor Call::input(size_t index, ONNXTensorElementDataType type, size_t least_axes) const {
  const OrtValue* value = nullptr;
  Api::check(Api::get().KernelContext_GetInput(context_, index, &value));
  Tensor tensor = tensor_of(value);
  if (tensor.type != type || tensor.shape.size() < least_axes)
    throw Invalid("input " + std::to_string(index) + " must be of element type " + std::to_string(type) +
                  " with at least " + std::to_string(least_axes) + " axes, got type " + std::to_string(tensor.type) + " and " +
                  shape_text(tensor.shape));
  if (is_aligned(tensor.data, type)) return tensor;
  const auto* bytes = static_cast<const uint8_t*>(tensor.data);
  tensor.aligned = std::make_shared<std::vector<uint8_t>>(bytes, bytes + tensor.size() * bytes_of(type));
  tensor.data = tensor.aligned->data();
  return tensor;
}

void* Call::output(size_t index, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  Api::check(Api::get().KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  Api::check(Api::get().GetTensorMutableData(value, &data));
  return data;
}

#if defined(__SANITIZE_THREAD__)
// onnxruntime is built without the thread sanitizer, which therefore does not see how threads wait inside it. These calls
// declare what onnxruntime guarantees: tasks begin after `run` is called, and end before it returns. The sanitizer still
// detects races between two tasks of one call.
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);

void CallThreads::run(Task task, size_t count, void* state) const {
  struct Marked {
    Task task;
    void* state;
    char begun, ended;
  } marked{task, state, 0, 0};
  const Task with_marks = [](void* own, size_t index) {
    auto* m = static_cast<Marked*>(own);
    __tsan_acquire(&m->begun);
    m->task(m->state, index);
    __tsan_release(&m->ended);
  };
  __tsan_release(&marked.begun);
  Api::check(Api::get().KernelContext_ParallelFor(call_.context(), with_marks, count, 0, &marked));
  __tsan_acquire(&marked.ended);
}
#else
void CallThreads::run(Task task, size_t count, void* state) const {
  Api::check(Api::get().KernelContext_ParallelFor(call_.context(), task, count, 0, state));
}
#endif

}  // namespace u2moe
