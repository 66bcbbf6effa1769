// What a layer has computed of rows that come again, as positions do: a chunk shares most with the chunk before, and streams
// share them with each other. A row is found only where all its bits are equal, and its result depends on nothing else, so
// results are the same with and without.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace u2moe {

// Rows of `k` bytes with a scale, and their results of `n` floats: at most `kMost`, of which those longest unused go.
class SeenRows {
 public:
  static constexpr size_t kMost = 512;
  SeenRows(size_t k, size_t n) : k_(k), n_(n), tags_(kMost) {}

  // Begins a call, unless another thread is in one. Forked meanwhile, a child never can, and computes all rows.
  bool begin();
  void end() { is_busy_.clear(std::memory_order_release); }
  // The result of a row, or null.
  const float* find(const uint8_t* row, float scale);
  // Keeps a row, unless rows of this call have its places.
  void keep(const uint8_t* row, float scale, const float* result);

 private:
  static constexpr size_t kPlaces = 16;  // of a row
  struct Tag {
    uint64_t hash = 0;
    uint64_t used = 0;  // number of the last call that did; 0: empty
    float* result = nullptr;  // the scale and the row follow
  };
  Tag* places_of(uint64_t hash) { return &tags_[hash % (kMost / kPlaces) * kPlaces]; }
  uint64_t hash_of(const uint8_t* row) const;

  size_t k_, n_, num_rows_ = 0;
  uint64_t call_ = 0;
  std::vector<Tag> tags_;
  std::unique_ptr<float[]> rows_;  // in the order of their first use: pages come into being when they are written
  std::atomic_flag is_busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace u2moe
