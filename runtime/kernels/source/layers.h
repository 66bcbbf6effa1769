// The layers that operators compute. Their inner loops are functions of an `InstructionSet`.
#pragma once
#include <cstddef>
#include <cstdint>

#include "instruction_set.h"
#include "layers/seen_rows.h"
#include "memory.h"

namespace u2moe {

// Runs tasks, possibly in several threads. Each number is computed by one task, and the tasks of a call write to
// different places. Results therefore do not depend on the number of threads.
class Threads {
 public:
  using Task = void (*)(void* state, size_t index);
  virtual void run(Task task, size_t count, void* state) const = 0;

  template <class F>
  void each(size_t count, F&& task) const {
    if (count == 1) return task(size_t{0});
    if (count > 0) run([](void* state, size_t index) { (*static_cast<F*>(state))(index); }, count, &task);
  }

 protected:
  ~Threads() = default;
};

// Experts with a router, or a single expert without a router. With a gate, the first product is multiplied by the
// activation of the gate's product.
struct ExpertLayer {
  size_t dim = 0, hidden = 0, experts = 1, top_k = 1, group = 0;
  Activation activation = Activation::relu;
  float lowest = 0;  // lowest hidden activation, for `Rounding8`
  Weights router;   // [dim, experts rounded up to panels]; unused without a router
  Weights weights;  // products of each expert in turn: gate, first, second
  size_t gate_bytes = 0, first_bytes = 0, second_bytes = 0;  // gate_bytes is 0 without a gate

  size_t expert_bytes() const { return gate_bytes + first_bytes + second_bytes; }
};
void run_experts(const InstructionSet& isa, const ExpertLayer& layer, const float* x, size_t tokens, float* y,
                 const Threads& threads);

struct LinearLayer {
  size_t k = 0, n = 0, group = 0;
  float lowest = 0;
  Weights weights;
};
// Multiplies rows by the weights. `run_linear` takes rows of floats, and `run_matmul` takes quantized rows with scales.
void run_linear(const InstructionSet& isa, const LinearLayer& layer, const float* x, size_t rows, float* y,
                const Threads& threads);
void run_matmul(const InstructionSet& isa, const LinearLayer& layer, const uint8_t* q, const float* scale, size_t rows,
                float* y, const Threads& threads);
// Same as `run_matmul` above, but takes results from `seen` for the rows that it contains. `seen` may be null.
void run_matmul(const InstructionSet& isa, const LinearLayer& layer, SeenRows* seen, const uint8_t* q, const float* scale,
                size_t rows, float* y, const Threads& threads);

// Rounds x [rows, k] to uint8 around 128, with one scale per row.
void run_rows(const InstructionSet& isa, const float* x, size_t rows, size_t k, float lowest, uint8_t* q, float* scale,
              const Threads& threads);

// Two convolutions over features, each with relu. The first one computes in floats. Its results are rounded with one
// scale per output frame of the second one. `first` is in panels [taps, 16], with the bias as the last tap. `second` is
// packed with its rows in the order (frequency, time, channels), so that each output position has a contiguous input.
struct ConvolutionLayer {
  size_t bins = 0, channels = 0, out = 0;  // channels is a multiple of 4
  size_t kernels[2] = {}, strides[2] = {};
  Weights first, second;

  size_t inner() const { return (bins - kernels[0]) / strides[0] + 1; }
  size_t outer() const { return (inner() - kernels[1]) / strides[1] + 1; }
  size_t taps() const { return kernels[0] * kernels[0] + 1; }
  size_t depth() const { return kernels[1] * kernels[1] * channels; }
  size_t frames(size_t time) const {
    const size_t window = strides[0] * (kernels[1] - 1) + kernels[0], stride = strides[0] * strides[1];
    return time < window ? 0 : (time - window) / stride + 1;
  }
};
// Computes y [batch, frames, outer, out] from x [batch, time, bins].
void run_convolutions(const InstructionSet& isa, const ConvolutionLayer& layer, const float* x, size_t batch, size_t time,
                      float* y, const Threads& threads);

void run_normalization(const InstructionSet& isa, const Normalization& layer, size_t rows, const Threads& threads);

// Runs the layer, and writes the convolution's last `kernel - 1` input frames to `kept` [batch, kernel - 1, channels].
// The caller need not set `layer.seen`.
void run_time_convolution(const InstructionSet& isa, TimeConvolution layer, float* kept, const Threads& threads);

// Computes attention. One task computes one head of one batch element.
void run_attention(const InstructionSet& isa, const Attention& attention, const Threads& threads);

}  // namespace u2moe
