// Rounding of rows to integers, and products of rows with one weight matrix.
#include <algorithm>
#include <cstring>
#include <memory>

#include "../layers.h"
#include "../layout.h"
#include "steps.h"

namespace u2moe {
namespace {

void multiply_linear(const InstructionSet& isa, const LinearLayer& layer, Product p, float* y, const Threads& threads) {
  p.weights = layer.weights.data();
  p.k = layer.k;
  p.n = layer.n;
  p.group = layer.group;
  p.then = Then::linear;
  p.out = y;
  p.out_stride = layer.n;
  const size_t blocks = blocks_of(layer.n);
  const size_t parts = std::max<size_t>(1, std::min(kTasks, blocks / kBlocksOfTask));
  threads.each(parts, [&](size_t task) { multiply(isa, p, part_of(blocks, task, parts)); });
}

}  // namespace

void run_linear(const InstructionSet& isa, const LinearLayer& layer, const float* x, size_t rows, float* y,
                const Threads& threads) {
  if (rows == 0) return;
  const Borrowed scratch;
  Product p{};
  p.stride = rounded_up(layer.k, 64);
  p.rows = rows;
  auto* codes = scratch->array<uint8_t>(kCodes, rows * p.stride * isa.code_bytes);
  auto* scale = scratch->array<float>(kScales, rows);
  const Rounding8 rounding{x, layer.k, layer.lowest, codes, p.stride, scale};
  threads.each((rows + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    isa.round8(rounding, task * kRowsOfTask, std::min(rows, (task + 1) * kRowsOfTask));
  });
  p.codes = codes;
  p.scale = scale;
  multiply_linear(isa, layer, p, y, threads);
}

void run_matmul(const InstructionSet& isa, const LinearLayer& layer, const uint8_t* q, const float* scale, size_t rows,
                float* y, const Threads& threads) {
  if (rows == 0) return;
  const Borrowed scratch;
  Product p{};
  p.rows = rows;
  p.scale = scale;
  p.stride = rounded_up(layer.k, 64);
  p.codes = q;
  if (!isa.has_byte_codes || p.stride != layer.k) {
    auto* codes = scratch->array<uint8_t>(kCodes, rows * p.stride * isa.code_bytes);
    isa.from_bytes(q, layer.k, codes, p.stride, rows);
    p.codes = codes;
  }
  multiply_linear(isa, layer, p, y, threads);
}

void run_matmul(const InstructionSet& isa, const LinearLayer& layer, SeenRows* seen, const uint8_t* q, const float* scale,
                size_t rows, float* y, const Threads& threads) {
  if (seen == nullptr || !seen->begin()) return run_matmul(isa, layer, q, scale, rows, y, threads);
  const std::unique_ptr<SeenRows, void (*)(SeenRows*)> used(seen, [](SeenRows* own) { own->end(); });
  const size_t k = layer.k, n = layer.n;
  const Borrowed scratch;
  auto* fresh = scratch->array<size_t>(kOrder, rows);
  size_t count = 0;
  for (size_t row = 0; row < rows; row++) {
    if (const float* found = seen->find(q + row * k, scale[row]))
      std::memcpy(y + row * n, found, n * sizeof *y);
    else
      fresh[count++] = row;
  }
  auto* fresh_q = scratch->array<uint8_t>(kRows, count * k);
  auto* fresh_scale = scratch->array<float>(kRowScale, count);
  auto* fresh_y = scratch->array<float>(kHidden, count * n);
  for (size_t i = 0; i < count; i++) {
    std::memcpy(fresh_q + i * k, q + fresh[i] * k, k);
    fresh_scale[i] = scale[fresh[i]];
  }
  run_matmul(isa, layer, fresh_q, fresh_scale, count, fresh_y, threads);
  for (size_t i = 0; i < count; i++) {
    std::memcpy(y + fresh[i] * n, fresh_y + i * n, n * sizeof *y);
    seen->keep(fresh_q + i * k, fresh_scale[i], fresh_y + i * n);
  }
}

void run_rows(const InstructionSet& isa, const float* x, size_t rows, size_t k, float lowest, uint8_t* q, float* scale,
              const Threads& threads) {
  const Rounding8 rounding{x, k, lowest, q, k, scale};
  threads.each((rows + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    isa.round_bytes(rounding, task * kRowsOfTask, std::min(rows, (task + 1) * kRowsOfTask));
  });
}

}  // namespace u2moe
