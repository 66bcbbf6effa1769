// Cache of a layer's results for rows that repeat, such as positions. Most rows of a chunk also occur in the chunk
// before, and different streams share rows. A row is found only if a stored row has the same bits. The result depends
// only on these bits, so it is identical with and without this cache.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace u2moe {

// A cache of at most `kMost` rows. Each has `k` bytes, a scale, and a result of `n` floats. The least recently used
// rows are replaced.
class SeenRows {
 public:
  static constexpr size_t kMost = 512;
  SeenRows(size_t k, size_t n) : k_(k), n_(n), tags_(kMost) {}

  // Begins a call. Returns false while another thread's call is running, and always in a child process that was
  // forked during a call. The caller then computes all rows.
  bool begin();
  void end() { is_busy_.clear(std::memory_order_release); }
  // Returns the stored result of a row; null if there is none.
  const float* find(const uint8_t* row, float scale);
  // Keeps a row and its result, unless rows of this call occupy all places that the row may take.
  void keep(const uint8_t* row, float scale, const float* result);

 private:
  static constexpr size_t kPlaces = 16;  // places that a row may take
  struct Tag {
    uint64_t hash = 0;
    uint64_t used = 0;  // number of the last call that used this place; 0: empty
    float* result = nullptr;  // the result, followed by the scale and the row
  };
  Tag* places_of(uint64_t hash) { return &tags_[hash % (kMost / kPlaces) * kPlaces]; }
  uint64_t hash_of(const uint8_t* row) const;

  size_t k_, n_, num_rows_ = 0;
  uint64_t call_ = 0;
  std::vector<Tag> tags_;
  std::unique_ptr<float[]> rows_;  // in order of first use, because only written pages take memory
  std::atomic_flag is_busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace u2moe
