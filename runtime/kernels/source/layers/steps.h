// The division of a layer into steps and tasks, and the arrays that steps use.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../instruction_set.h"
#include "../layout.h"
#include "../memory.h"

namespace u2moe {

constexpr size_t kTasks = 16;           // tasks of a step with enough work: more than threads, to balance the load
constexpr size_t kRowsOfTask = 8;       // rows rounded by one task
constexpr size_t kSmallRowsOfTask = 32;  // rows of one task if a row takes a fraction of a microsecond
constexpr size_t kBlocksOfTask = 3;     // minimum blocks of one task, so that it reads contiguous memory

// Indices of the arrays in a call's scratch memory.
enum Arrays : size_t { kCodes, kScales, kExpert, kShare, kOrder, kToken, kRowShare, kRows, kRowScale, kHidden,
                       kHiddenCodes, kHiddenScale, kSegments };

// Items from `first` to `last` (exclusive). `part_of` divides `count` items into `parts` ranges, and returns range
// `index`.
struct Range {
  size_t first, last;
};
inline Range part_of(size_t count, size_t index, size_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

// Multiplies the blocks of one task.
inline void multiply(const InstructionSet& isa, Product p, Range blocks) {
  if (!p.group) return isa.multiply8(p, blocks.first, blocks.last);
  const Borrowed own;
  p.room = own->array<uint8_t>(kCodes, kUnpacked * block_bytes8(p.k));
  isa.multiply4(p, blocks.first, blocks.last);
}

// Indices of the parts of an array. Each running task takes one. A single thread always takes the first part, which
// stays in its cache.
class Slots {
 public:
  size_t take() {
    uint32_t used = used_.load();
    while (true) {
      size_t slot = 0;
      while (used >> slot & 1) slot++;
      if (used_.compare_exchange_weak(used, used | uint32_t{1} << slot)) return slot;
    }
  }
  void give_back(size_t slot) { used_.fetch_and(~(uint32_t{1} << slot)); }

 private:
  std::atomic<uint32_t> used_{0};
};

}  // namespace u2moe
