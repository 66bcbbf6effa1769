// Memory for temporary arrays of calls, and for packed weights (in huge pages if the system provides them).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace u2moe {

struct Chunk;

// Bytes aligned to a cache line. Unless they are borrowed, they lie in a chunk that is shared by the weights of several
// kernels, and the destructor releases them.
class Weights {
 public:
  Weights() = default;
  explicit Weights(size_t bytes);
  // Borrows the caller's bytes, which must be aligned to a cache line.
  explicit Weights(const uint8_t* lent) : data_(const_cast<uint8_t*>(lent)) {}
  Weights(Weights&& other) noexcept { *this = static_cast<Weights&&>(other); }
  Weights& operator=(Weights&& other) noexcept;
  ~Weights();
  uint8_t* data() const { return data_; }

 private:
  Chunk* chunk_ = nullptr;
  uint8_t* data_ = nullptr;
};

// Releases the memory of a constant if onnxruntime has mapped it from a file. Weights are then in memory only once, in
// packed form. The mapping stays, so later reads load the data from the file again.
void give_back_file_pages(const void* data, size_t bytes) noexcept;

// Temporary arrays of a call. They grow when needed, and are kept for later calls.
class Scratch {
 public:
  ~Scratch();
  // Returns the array at index `number`, with room for `count` elements. Its previous content is lost.
  template <class T>
  T* array(size_t number, size_t count) {
    return reinterpret_cast<T*>(bytes(number, count * sizeof(T)));
  }

 private:
  static constexpr size_t kArrays = 13;
  uint8_t* bytes(size_t number, size_t size);
  uint8_t* arrays_[kArrays] = {};
  size_t sizes_[kArrays] = {};
};

// Borrows a free `Scratch` of this process; makes one only if none is free.
class Borrowed {
 public:
  Borrowed();
  ~Borrowed();
  Scratch& operator*() const { return *scratch_; }
  Scratch* operator->() const { return scratch_.get(); }

 private:
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace u2moe
