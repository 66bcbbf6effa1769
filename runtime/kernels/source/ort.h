// The parts of onnxruntime's C API that operators need. Statuses of onnxruntime become exceptions here. Where
// onnxruntime calls the library, exceptions become statuses.
#pragma once
#if defined(__MINGW32__)  // the header assumes that Windows means MSVC
#define _stdcall __stdcall
#define _Return_type_success_(condition)
#endif
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layers.h"
#include "memory.h"

namespace u2moe {

constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "onnxruntime_c_api.h is older than onnxruntime 1.17");

// An error in a graph or in a call. `guarded` turns it into an error of onnxruntime.
struct Invalid : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Api {
 public:
  static void use(const OrtApi* api);  // sets the API of this thread
  static const OrtApi& get();
  static void check(OrtStatus* status);  // throws `Invalid` with the message of an error
  static OrtStatus* failed(const char* op, const char* message) noexcept;
};

// Makes `api` the API of this thread and runs `work`. Returns exceptions as a status.
template <class F>
OrtStatus* guarded(const OrtApi* api, const char* op, F&& work) noexcept {
  Api::use(api);
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return Api::failed(op, error.what());
  } catch (...) {
    return Api::failed(op, "unknown error");
  }
}

// A tensor with a known shape. Shapes of tensors that are not constants may change between calls.
struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::shared_ptr<std::vector<uint8_t>> aligned;  // copy of `data` if it was not aligned

  size_t size() const;
  size_t axis(size_t index) const { return static_cast<size_t>(shape[index]); }
  size_t last() const { return static_cast<size_t>(shape.back()); }
  size_t rows() const;  // product of all axes except the last
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};
Tensor tensor_of(const OrtValue* value);

// Node attributes and constant inputs, available while a kernel is created.
class Node {
 public:
  explicit Node(const OrtKernelInfo* info);
  size_t num_inputs() const { return num_inputs_; }
  size_t num_read() const { return next_; }  // counts skipped inputs, too
  int64_t integer(const char* name, int64_t least, int64_t most) const;
  float number(const char* name, float least, float most) const;
  std::string text(const char* name) const;
  std::string name() const;  // name of the node in the graph
  void pair(const char* name, int64_t most, size_t (&values)[2]) const;  // two integers, each from 1 to `most`
  // Returns the next input, which must be a constant of this type and shape. -1 stands for any size of at least 1.
  template <class T>
  const T* constant(const char* what, const std::vector<int64_t>& shape, std::vector<int64_t>* found = nullptr) {
    return static_cast<const T*>(next(what, type_of(static_cast<const T*>(nullptr)), shape, found));
  }
  bool has(const char* attribute) const;
  // Returns the next input, which must be weights that were packed in advance. They are used in place if they are
  // aligned to a cache line, and copied otherwise.
  Weights packed(size_t bytes);
  void skip() { next_++; }  // skips an input that is not constant
  // Releases the pages of constants that onnxruntime has mapped from a file. The kernel calls this once it has copied
  // all constants.
  void give_back() const {
    for (const auto& [data, bytes] : constants_) give_back_file_pages(data, bytes);
  }

 private:
  static ONNXTensorElementDataType type_of(const float*) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  static ONNXTensorElementDataType type_of(const int8_t*) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8; }
  static ONNXTensorElementDataType type_of(const uint8_t*) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
  const void* next(const char* what, ONNXTensorElementDataType type, const std::vector<int64_t>& shape,
                   std::vector<int64_t>* found);

  const OrtKernelInfo* info_;
  size_t num_inputs_ = 0, next_ = 0;
  std::vector<std::pair<const void*, size_t>> constants_;
  std::vector<Weights> aligned_;  // copies of unaligned weights
};

// Inputs and outputs of one call.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {}
  Tensor input(size_t index, ONNXTensorElementDataType type, size_t least_axes = 1) const;
  void* output(size_t index, const std::vector<int64_t>& shape) const;
  OrtKernelContext* context() const { return context_; }

 private:
  OrtKernelContext* context_;
};

// Runs tasks in the threads of onnxruntime.
class CallThreads final : public Threads {
 public:
  explicit CallThreads(const Call& call) : call_(call) {}
  void run(Task task, size_t count, void* state) const override;

 private:
  const Call& call_;
};

}  // namespace u2moe
