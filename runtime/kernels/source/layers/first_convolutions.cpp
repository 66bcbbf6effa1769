// The convolutions of the front end.
#include <algorithm>
#include <cstring>

#include "../layers.h"
#include "../layout.h"
#include "steps.h"

namespace u2moe {
namespace {

constexpr size_t kConvolvedBytes = 512 << 10;  // bytes of inputs at a time, so that they stay in the cache

// Copies the input of one output frame from x [time, bins]. The input consists of parts, one for each combination of
// an output frequency of the first convolution and a time step of the second kernel. A part consists of the inputs
// under the kernel of the first convolution, then 1 for the bias.
void see(const ConvolutionLayer& layer, const float* x, float* patches) {
  for (size_t f = 0; f < layer.inner(); f++) {
    for (size_t t = 0; t < layer.kernels[1]; t++) {
      const float* corner = x + t * layer.strides[0] * layer.bins + f * layer.strides[0];
      for (size_t row = 0; row < layer.kernels[0]; row++, patches += layer.kernels[0])
        std::memcpy(patches, corner + row * layer.bins, layer.kernels[0] * sizeof(float));
      *patches++ = 1.0f;
    }
  }
}

}  // namespace

void run_convolutions(const InstructionSet& isa, const ConvolutionLayer& layer, const float* x, size_t batch, size_t time,
                      float* y, const Threads& threads) {
  const size_t frames = layer.frames(time), count = batch * frames, outer = layer.outer();
  if (count == 0) return;
  const size_t depth = layer.depth(), stride = rounded_up(depth, 64), code = isa.code_bytes;
  const size_t positions = layer.inner() * layer.kernels[1], seen = positions * layer.taps();
  const size_t sums = positions * rounded_up(layer.channels, kPanel), window = layer.kernels[1] * layer.channels;
  const size_t most = std::max<size_t>(1, std::min(count, kConvolvedBytes / (outer * stride * code)));
  const size_t slots = std::min(most, kTasks);
  const Borrowed scratch;
  auto* patches = scratch->array<float>(kHidden, slots * seen);
  auto* floats = scratch->array<float>(kRowScale, slots * sums);
  auto* codes = scratch->array<uint8_t>(kHiddenCodes, slots * positions * layer.channels * code);
  auto* rows = scratch->array<uint8_t>(kCodes, most * outer * stride * code);
  auto* scale = scratch->array<float>(kScales, most * outer);
  for (size_t first = 0; first < count; first += most) {
    const size_t own = std::min(most, count - first), tasks = std::min(own, slots);
    Slots free;
    threads.each(tasks, [&](size_t task) {
      const size_t slot = free.take();
      auto* kept = codes + slot * positions * layer.channels * code;
      const Range range = part_of(own, task, tasks);
      for (size_t i = range.first; i < range.last; i++) {
        const size_t row = (first + i) / frames, frame = (first + i) % frames;
        see(layer, x + (row * time + frame * layer.strides[0] * layer.strides[1]) * layer.bins, patches + slot * seen);
        float found;
        isa.convolve({patches + slot * seen, reinterpret_cast<const float*>(layer.first.data()), positions, layer.taps(),
                      layer.channels, kept, &found}, floats + slot * sums);
        for (size_t o = 0; o < outer; o++) {
          uint8_t* to = rows + (i * outer + o) * stride * code;
          std::memcpy(to, kept + o * layer.strides[1] * window * code, depth * code);
          std::memset(to + depth * code, 0, (stride - depth) * code);
          scale[i * outer + o] = found;
        }
      }
      free.give_back(slot);
    });
    Product p{};
    p.codes = rows;
    p.stride = stride;
    p.rows = own * outer;
    p.weights = layer.second.data();
    p.k = depth;
    p.n = layer.out;
    p.scale = scale;
    p.then = Then::hidden;
    p.activation = Activation::relu;
    p.out = y + first * outer * layer.out;
    p.out_stride = layer.out;
    const size_t blocks = blocks_of(layer.out), parts = std::min(kTasks, blocks);
    threads.each(parts, [&](size_t task) {
      const Range range = part_of(blocks, task, parts);
      isa.multiply8(p, range.first, range.last);
    });
  }
}

}  // namespace u2moe
