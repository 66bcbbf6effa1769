// The layers that operators compute, written once over the loops of an instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "instruction_set.h"
#include "memory.h"

namespace u2moe {

// Runs tasks, possibly in several threads. Results do not depend on how: each number is computed by one task, and tasks
// of one call write to different places.
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

// One packed product; for int4 `group` is not 0.
struct PackedProduct {
  size_t k, n, group;
  const uint8_t* weights;
};

// Experts with a router, or a single one without.
struct ExpertLayer {
  size_t dim = 0, hidden = 0, experts = 1, top_k = 1, group = 0;
  Activation activation = Activation::relu;
  float lowest = 0;      // of hidden activations, as `Rounding8`
  bool by_peak = false;  // as `Rounding8`
  float skip_below = 0;
  Weights gate;     // [dim, experts rounded up to panels]; unused without a router
  Weights weights;  // both products of each expert, one after the other
  size_t first_bytes = 0, second_bytes = 0;
};
void run_experts(const InstructionSet& isa, const ExpertLayer& layer, const float* x, size_t tokens, float* y,
                 const Threads& threads);

struct LinearLayer {
  size_t k = 0, n = 0;
  float lowest = 0;
  Weights weights;
};
// From rows in float, or from quantized rows with their peaks.
void run_linear(const InstructionSet& isa, const LinearLayer& layer, const float* x, size_t rows, float* y,
                const Threads& threads);
void run_matmul(const InstructionSet& isa, const LinearLayer& layer, const uint8_t* q, const float* peak, size_t rows,
                float* y, const Threads& threads);

// x [rows, k] to uint8 around 128 and peaks.
void run_rows(const InstructionSet& isa, const float* x, size_t rows, size_t k, float lowest, uint8_t* q, float* peak,
              const Threads& threads);

}  // namespace u2moe
