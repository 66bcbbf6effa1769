#include "seen_rows.h"

#include <algorithm>
#include <cstring>

namespace u2moe {

bool SeenRows::begin() {
  if (is_busy_.test_and_set(std::memory_order_acquire)) return false;
  call_++;
  return true;
}

uint64_t SeenRows::hash_of(const uint8_t* row) const {
  uint64_t words[8] = {};  // the first 64 bytes; rows that differ only in later bytes share their places
  std::memcpy(words, row, std::min(k_, sizeof words));
  uint64_t hash = 0;
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return hash;
}

const float* SeenRows::find(const uint8_t* row, float scale) {
  const uint64_t hash = hash_of(row);
  Tag* const places = places_of(hash);
  Tag* const found = std::find_if(places, places + kPlaces, [&](const Tag& tag) {
    return tag.used != 0 && tag.hash == hash && std::memcmp(tag.result + n_, &scale, sizeof scale) == 0 &&
           std::memcmp(tag.result + n_ + 1, row, k_) == 0;
  });
  if (found == places + kPlaces) return nullptr;
  found->used = call_;
  return found->result;
}

void SeenRows::keep(const uint8_t* row, float scale, const float* result) {
  if (find(row, scale) != nullptr) return;  // the row occurs twice in this call
  const uint64_t hash = hash_of(row);
  Tag* const places = places_of(hash);
  Tag* const oldest =
      std::min_element(places, places + kPlaces, [](const Tag& a, const Tag& b) { return a.used < b.used; });
  if (oldest->used == call_) return;
  const size_t stride = n_ + 1 + (k_ + sizeof(float) - 1) / sizeof(float);
  if (rows_ == nullptr) rows_.reset(new float[kMost * stride]);
  float* const to = oldest->used == 0 ? &rows_[num_rows_++ * stride] : oldest->result;
  std::memcpy(to, result, n_ * sizeof *to);
  std::memcpy(to + n_, &scale, sizeof scale);
  std::memcpy(to + n_ + 1, row, k_);
  *oldest = {hash, call_, to};
}

}  // namespace u2moe
