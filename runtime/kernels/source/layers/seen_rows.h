// Stored results of a layer for rows that repeat, such as positions. A chunk shares most of them with the chunk before,
// and streams share them with each other. A row is found only if all its bits are equal. Its result depends on nothing
// else, so results are identical with and without this cache.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace u2moe {

// Rows of `k` bytes with a scale, and their results of `n` floats: at most `kMost`; the least recently used are
// dropped.
class SeenRows {
 public:
  static constexpr size_t kMost = 512;
  SeenRows(size_t k, size_t n) : k_(k), n_(n), tags_(kMost) {}

  // Begins a call. Returns false if another thread is in one, and always in a child process that was forked during one:
  // all rows are then computed.
  bool begin();
  void end() { is_busy_.clear(std::memory_order_release); }
  // Returns the result of a row, or null.
  const float* find(const uint8_t* row, float scale);
  // Keeps a row, unless rows of this call occupy its places.
  void keep(const uint8_t* row, float scale, const float* result);

 private:
  static constexpr size_t kPlaces = 16;  // places of a row
  struct Tag {
    uint64_t hash = 0;
    uint64_t used = 0;  // number of the last call that used it; 0: empty
    float* result = nullptr;  // the scale and the row follow
  };
  Tag* places_of(uint64_t hash) { return &tags_[hash % (kMost / kPlaces) * kPlaces]; }
  uint64_t hash_of(const uint8_t* row) const;

  size_t k_, n_, num_rows_ = 0;
  uint64_t call_ = 0;
  std::vector<Tag> tags_;
  std::unique_ptr<float[]> rows_;  // in order of first use, because pages are created when they are written
  std::atomic_flag is_busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace u2moe
