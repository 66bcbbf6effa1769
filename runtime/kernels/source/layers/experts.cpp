// Mixtures of experts, and feed-forward layers: routing, sorting by expert, rounding and products.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "../layers.h"
#include "../layout.h"
#include "steps.h"

namespace u2moe {
namespace {

constexpr size_t kHiddenBytes = 384 << 10;  // bytes of hidden activations at a time, so that they stay in the cache
constexpr size_t kLeastRows = 96;          // rows always allowed at once, because each segment reads the weights again

// Consecutive rows of one expert that are computed at once.
struct Segment {
  size_t expert, first, rows;
};

// Rows as integers, with one scale for each row.
struct Rows {
  uint8_t* codes;
  size_t stride, row_bytes;  // length of a row of codes, in elements and in bytes
  float* scale;
};

Rows rows_of(Scratch& scratch, const InstructionSet& isa, size_t count, size_t k, Arrays codes, Arrays scale) {
  Rows r{};
  r.stride = rounded_up(k, 64);
  r.row_bytes = r.stride * isa.code_bytes;
  r.codes = scratch.array<uint8_t>(codes, count * r.row_bytes);
  r.scale = scratch.array<float>(scale, count);
  return r;
}

void round_rows(const InstructionSet& isa, const float* x, size_t count, size_t k, float lowest, const Rows& to,
                const Threads& threads) {
  const Rounding8 rounding{x, k, lowest, to.codes, to.stride, to.scale};
  threads.each((count + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    isa.round8(rounding, task * kRowsOfTask, std::min(count, (task + 1) * kRowsOfTask));
  });
}

Product product_of(const Rows& rows, size_t first, size_t count, const uint8_t* weights, size_t k, size_t n,
                   size_t group) {
  Product p{};
  p.codes = rows.codes + first * rows.row_bytes;
  p.stride = rows.stride;
  p.rows = count;
  p.weights = weights;
  p.k = k;
  p.n = n;
  p.group = group;
  p.scale = rows.scale + first;
  return p;
}

class Experts {
 public:
  Experts(const InstructionSet& isa, const ExpertLayer& layer, size_t tokens, float* y, Scratch& scratch,
          const Threads& threads)
      : isa_(isa), layer_(layer), tokens_(tokens), y_(y), scratch_(scratch), threads_(threads) {}

  void run(const float* x) {
    std::memset(y_, 0, tokens_ * layer_.dim * sizeof(float));
    route(x);
    const Rows tokens = rows_of(scratch_, isa_, tokens_, layer_.dim, kCodes, kScales);
    round_rows(isa_, x, tokens_, layer_.dim, 0.0f, tokens, threads_);
    const size_t row_bytes = layer_.hidden * sizeof(float);
    const size_t most = std::max(kLeastRows, kHiddenBytes / row_bytes);
    // Compute successive segments together as long as their hidden activations fit in the cache.
    size_t used = 0, count = 0;
    auto* group = scratch_.array<Segment>(kSegments, layer_.experts + 2);
    for (size_t e = 0; e < layer_.experts; e++) {
      for (size_t first = start_[e]; first < start_[e + 1];) {
        const size_t left = start_[e + 1] - first, parts = (left + most - 1) / most, rows = (left + parts - 1) / parts;
        if (count > 0 && used + rows > most) {
          compute(tokens, group, count, used);
          used = count = 0;
        }
        group[count++] = {e, first, rows};
        used += rows;
        first += rows;
      }
    }
    if (count > 0) compute(tokens, group, count, used);
  }

 private:
  // Assigns tokens to experts, and sorts the assignments by expert.
  void route(const float* x) {
    const size_t k = layer_.top_k, assignments = tokens_ * k;
    start_ = scratch_.array<size_t>(kOrder, layer_.experts + 1 + layer_.experts);
    size_t* next = start_ + layer_.experts + 1;
    token_of_ = scratch_.array<uint32_t>(kToken, assignments);
    share_of_ = scratch_.array<float>(kRowShare, assignments);
    std::fill(start_, start_ + layer_.experts + 1, size_t{0});
    if (layer_.experts == 1 && layer_.router.data() == nullptr) {
      start_[1] = tokens_;
      for (size_t t = 0; t < tokens_; t++) {
        token_of_[t] = static_cast<uint32_t>(t);
        share_of_[t] = 1.0f;
      }
      return;
    }
    auto* expert = scratch_.array<uint32_t>(kExpert, assignments);
    auto* share = scratch_.array<float>(kShare, assignments);
    const Routing routing{x, reinterpret_cast<const float*>(layer_.router.data()), layer_.dim, layer_.experts, k,
                          expert, share};
    threads_.each((tokens_ + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
      isa_.route(routing, task * kRowsOfTask, std::min(tokens_, (task + 1) * kRowsOfTask));
    });
    for (size_t i = 0; i < assignments; i++) start_[expert[i] + 1]++;
    for (size_t e = 0; e < layer_.experts; e++) {
      next[e] = start_[e];
      start_[e + 1] += start_[e];
    }
    for (size_t i = 0; i < assignments; i++) {
      const size_t row = next[expert[i]]++;
      token_of_[row] = static_cast<uint32_t>(i / k);
      share_of_[row] = share[i];
    }
  }

  void compute(const Rows& tokens, const Segment* group, size_t count, size_t num_rows) {
    const size_t dim = layer_.dim, hidden = layer_.hidden, size = layer_.group, first_row = group[0].first;
    const uint32_t* token = token_of_ + first_row;
    const Rows rows = gathered(tokens, token, num_rows);
    auto* h = scratch_.array<float>(kHidden, num_rows * hidden);
    const size_t blocks = blocks_of(hidden);
    const size_t parts = std::max<size_t>(1, std::min((kTasks + count - 1) / count, blocks / kBlocksOfTask));
    const auto caller = std::this_thread::get_id();
    std::atomic<bool> is_alone{true};  // whether the caller has run all tasks
    threads_.each(count * parts, [&](size_t task) {
      if (std::this_thread::get_id() != caller) is_alone = false;
      const Segment& s = group[task / parts];
      const Range own = part_of(blocks, task % parts, parts);
      Product p = product_of(rows, s.first - first_row, s.rows, expert(s.expert), dim, hidden, size);
      p.then = Then::hidden;
      p.activation = layer_.activation;
      p.out = h + (s.first - first_row) * hidden;
      p.out_stride = hidden;
      if (layer_.gate_bytes > 0) {
        multiply(isa_, p, own);
        p.weights += layer_.gate_bytes;
        p.then = Then::gated;
      }
      if (own.last == blocks)
        p.after = task + 1 < count * parts ? expert(group[task / parts + 1].expert) : second(group[0].expert);
      multiply(isa_, p, own);
    });
    const Rows inner = rows_of(scratch_, isa_, num_rows, hidden, kHiddenCodes, kHiddenScale);
    round_rows(isa_, h, num_rows, hidden, layer_.lowest, inner, threads_);
    for (size_t row = 0; row < num_rows; row++) inner.scale[row] *= share_of_[first_row + row];
    const size_t out_blocks = blocks_of(dim);
    // a single thread reads each expert to its end, because jumps between narrow experts interrupt prefetching
    const size_t out_parts = is_alone ? 1 : std::max<size_t>(1, std::min(kTasks, out_blocks / kBlocksOfTask));
    const size_t block_bytes = layer_.second_bytes / out_blocks;
    threads_.each(out_parts, [&](size_t task) {
      const Range own = part_of(out_blocks, task, out_parts);
      for (size_t i = 0; i < count; i++) {
        const Segment& s = group[i];
        const size_t row = s.first - first_row;
        Product p = product_of(inner, row, s.rows, second(s.expert), hidden, dim, size);
        p.after = i + 1 < count ? second(group[i + 1].expert) + own.first * block_bytes
                                : second(group[0].expert) + own.last * block_bytes;
        p.then = Then::scatter;
        p.out = y_;
        p.out_stride = dim;
        p.token = token + row;
        p.share = share_of_ + s.first;
        multiply(isa_, p, own);
      }
    });
  }

  // Returns, for each assignment in order, a copy of its token's row.
  Rows gathered(const Rows& tokens, const uint32_t* token, size_t count) {
    Rows rows = rows_of(scratch_, isa_, count, layer_.dim, kRows, kRowScale);
    for (size_t row = 0; row < count; row++) {
      std::memcpy(rows.codes + row * rows.row_bytes, tokens.codes + token[row] * rows.row_bytes, rows.row_bytes);
      rows.scale[row] = tokens.scale[token[row]];
    }
    return rows;
  }

  const uint8_t* second(size_t number) const { return expert(number) + layer_.gate_bytes + layer_.first_bytes; }
  const uint8_t* expert(size_t number) const { return layer_.weights.data() + number * layer_.expert_bytes(); }

  const InstructionSet& isa_;
  const ExpertLayer& layer_;
  const size_t tokens_;
  float* y_;
  Scratch& scratch_;
  const Threads& threads_;
  size_t* start_ = nullptr;
  uint32_t* token_of_ = nullptr;
  float* share_of_ = nullptr;
};

}  // namespace

void run_experts(const InstructionSet& isa, const ExpertLayer& layer, const float* x, size_t tokens, float* y,
                 const Threads& threads) {
  if (tokens == 0) return;
  const Borrowed scratch;
  Experts(isa, layer, tokens, y, *scratch, threads).run(x);
}

}  // namespace u2moe
