// The layers between the matrix products of streamed blocks: attention, convolution over time and normalisation.
#include <algorithm>
#include <cstring>

#include "../layers.h"
#include "../layout.h"
#include "steps.h"

namespace u2moe {

void run_normalization(const InstructionSet& isa, const Normalization& layer, size_t rows, const Threads& threads) {
  threads.each((rows + kSmallRowsOfTask - 1) / kSmallRowsOfTask, [&](size_t task) {
    isa.normalize(layer, task * kSmallRowsOfTask, std::min(rows, (task + 1) * kSmallRowsOfTask));
  });
}

void run_time_convolution(const InstructionSet& isa, TimeConvolution layer, float* kept, const Threads& threads) {
  const size_t past = layer.kernel - 1, frames = past + layer.time;
  const size_t seen = layer.batch * frames, rows = layer.batch * layer.time;
  const Borrowed scratch;
  layer.seen = scratch->array<float>(kHidden, seen * layer.width);
  threads.each((seen + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    isa.see(layer, task * kRowsOfTask, std::min(seen, (task + 1) * kRowsOfTask));
  });
  threads.each((rows + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    isa.convolve_in_time(layer, task * kRowsOfTask, std::min(rows, (task + 1) * kRowsOfTask));
  });
  for (size_t row = 0; row < layer.batch * past; row++, kept += layer.channels) {
    const float* from = layer.seen + (row / past * frames + layer.time + row % past) * layer.width;
    std::memcpy(kept, from, layer.channels * sizeof(float));
  }
}

void run_attention(const InstructionSet& isa, const Attention& attention, const Threads& threads) {
  const size_t count = attention.batch * attention.heads, tasks = std::min(count, kTasks);
  if (attention.time == 0 || count == 0) return;
  const size_t keys = attention.num_past + attention.time;
  const size_t floats = rounded_up((keys + attention.time + 2 * kPanel) * attention.size + keys * kPanel, kPanel);
  const Borrowed scratch;
  auto* all = scratch->array<float>(kCodes, tasks * floats);
  Slots slots;
  threads.each(tasks, [&](size_t task) {
    const Range own = part_of(count, task, tasks);
    const size_t slot = slots.take();
    for (size_t head = own.first; head < own.last; head++) isa.attend(attention, head, all + slot * floats);
    slots.give_back(slot);
  });
}

}  // namespace u2moe
