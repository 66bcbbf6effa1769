// Memory for packed weights, in huge pages where the system gives them, and for what a call needs while it runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace u2moe {

struct Chunk;

// Bytes aligned to a cache line, part of a chunk that weights of several kernels share; given back at destruction.
class Weights {
 public:
  Weights() = default;
  explicit Weights(size_t bytes);
  // Bytes that somebody else owns, and that lie at the start of a cache line.
  explicit Weights(const uint8_t* lent) : data_(const_cast<uint8_t*>(lent)) {}
  Weights(Weights&& other) noexcept { *this = static_cast<Weights&&>(other); }
  Weights& operator=(Weights&& other) noexcept;
  ~Weights();
  uint8_t* data() const { return data_; }

 private:
  Chunk* chunk_ = nullptr;
  uint8_t* data_ = nullptr;
};

// Gives back the memory of a constant that onnxruntime has mapped from a file, and leaves any other as it is: weights are
// then in memory once, packed. The mapping stays; whoever reads it reads the file again.
void give_back_file_pages(const void* data, size_t bytes) noexcept;

// Arrays that grow when needed and stay for the next call.
class Scratch {
 public:
  ~Scratch();
  // The array of this number with room for `count` elements, and some more that vectors may touch. What it held is lost.
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

// One of those that are free in this process; as many exist as calls have run at once.
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
