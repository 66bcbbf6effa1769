// Compares the speed of layers with the peak speed of the processor. Prints how many products per second the
// processor's integer instruction computes in registers, then the same for layers with the sizes of MoE-1B. Uses the
// instruction set that U2MOE_KERNELS_ISA names, or else the best. Each time is the shortest of many runs, measured as
// processor time of one thread, so a busy machine affects it little.
//
//     u2moe_kernels_rates [SECONDS PER MEASUREMENT]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <vector>

#include "cases.h"
#if defined(U2MOE_AMX)
#include "../vectors/amx.h"
#endif

namespace u2moe {
namespace {

constexpr size_t kDim = 576, kHidden = 1920, kBins = 80;
constexpr size_t kChunk = 16, kTenSeconds = 250;  // rows of a chunk, and of ten seconds
constexpr size_t kRunsAtLeast = 3;

double processor_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

double least_seconds(double budget, const std::function<void()>& run) {
  double least = 1e30, used = 0;
  run();  // warms up memory and caches
  for (size_t i = 0; i < kRunsAtLeast || used < budget; i++) {
    const double start = processor_seconds();
    run();
    const double seconds = std::max(processor_seconds() - start, 1e-6);
    least = std::min(least, seconds);
    used += seconds;
  }
  return least;
}

class Report {
 public:
  Report(const InstructionSet& isa, double budget) : budget_(budget), most_(most_products(isa, budget)) {
    std::printf("%s: ", isa.name);
    most_ > 0 ? std::printf("registers only: %.0f products per nanosecond\n", most_ * 1e-9)
              : std::printf("products in registers are not measured\n");
  }

  void add(const char* name, double products, const std::function<void()>& run) const {
    const double seconds = least_seconds(budget_, run), rate = products / seconds;
    std::printf("%-40s %9.1f us %6.0f products per ns", name, seconds * 1e6, rate * 1e-9);
    if (most_ > 0) std::printf(" %5.0f %%", 100 * rate / most_);
    std::printf("\n");
    std::fflush(stdout);
  }

 private:
  // Returns the products per second with all operands in registers; 0 if there is no loop for this instruction set.
  static double most_products(const InstructionSet& isa, double budget);

  double budget_, most_;
};

#if defined(__GNUC__) && defined(__x86_64__)
// Defines a function that loops. Each round executes `step` once for each of the registers `numbers`, which hold sums.
#define U2MOE_LOOP(name, isa, numbers, step, ...)                                                                     \
  __attribute__((target(isa))) void name(long rounds) {                                                               \
    asm volatile("1:\n\t.irp i," numbers "\n\t" step "\n\t.endr\n\tdec %0\n\tjnz 1b" : "+r"(rounds) : : "cc", __VA_ARGS__); \
  }

U2MOE_LOOP(multiply_avx512, "avx512f,avx512vnni", "0,1,2,3,4,5,6,7,8,9,10,11",
           "vpdpbusd %%zmm14, %%zmm15, %%zmm\\i", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
           "xmm9", "xmm10", "xmm11")
U2MOE_LOOP(multiply_avx_vnni, "avx2", "0,1,2,3,4,5,6,7,8,9,10,11", "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\i",
           "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")
U2MOE_LOOP(multiply_avx2, "avx2", "0,1,2,3,4,5,6,7,8,9",
           "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n\tvpmaddwd %%ymm13, %%ymm12, %%ymm12\n\t"
           "vpaddd %%ymm12, %%ymm\\i, %%ymm\\i",
           "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm12")
#if defined(U2MOE_AMX) && !defined(U2MOE_AMX_EMULATED)
void multiply_amx(long rounds) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.row_bytes[t] = 64, shapes.rows[t] = 16;
  asm volatile(
      "ldtilecfg %1\n\t1:\n\ttdpbusd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
      "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\ttdpbusd %%tmm7, %%tmm5, %%tmm3\n\tdec %0\n\tjnz 1b\n\ttilerelease"
      : "+r"(rounds)
      : "m"(shapes)
      : "cc");
}
#else
constexpr void (*multiply_amx)(long) = nullptr;
#endif

constexpr struct {
  const char* isa;
  double products;  // products of one round
  void (*run)(long rounds);
} kLoops[] = {{"amx", 4 * 16 * 16 * 64.0, multiply_amx},
              {"avx512-vnni", 12 * 64.0, multiply_avx512},
              {"avx-vnni", 12 * 32.0, multiply_avx_vnni},
              {"avx2", 10 * 32.0, multiply_avx2}};

double Report::most_products(const InstructionSet& isa, double budget) {
  constexpr long kRounds = 30000;  // takes about as long as a layer
  for (const auto& loop : kLoops)
    if (loop.run != nullptr && std::strcmp(isa.name, loop.isa) == 0)
      return static_cast<double>(kRounds) * loop.products / least_seconds(budget, [&] { loop.run(kRounds); });
  return 0;
}
#else
double Report::most_products(const InstructionSet&, double) { return 0; }
#endif

void measure_experts(const Report& report, const InstructionSet& isa, const char* name, size_t experts, size_t group,
                     size_t rows) {
  Random random(rows, true);
  const Case c{kDim, kHidden, experts, experts > 1 ? size_t{2} : size_t{1}, group, rows, Activation::swish};
  ExpertLayer layer = expert_layer(c, random);
  if (experts == 1) layer.router = Weights();
  const auto x = random.numbers(rows * kDim, 2.0f);
  std::vector<float> y(x.size());
  report.add(name, 2.0 * static_cast<double>(rows * c.top_k * kDim * kHidden),
             [&] { run_experts(isa, layer, x.data(), rows, y.data(), Serial()); });
}

void measure_linear(const Report& report, const InstructionSet& isa, const char* name, size_t rows) {
  Random random(rows, true);
  LinearLayer layer;
  layer.k = layer.n = kDim;
  layer.weights = Weights(packed_bytes8(kDim, kDim));
  pack(random, kDim, kDim, 0, layer.weights.data());
  const auto x = random.numbers(rows * kDim, 3.0f);
  std::vector<float> y(x.size());
  report.add(name, static_cast<double>(rows * kDim * kDim),
             [&] { run_linear(isa, layer, x.data(), rows, y.data(), Serial()); });
}

void measure_convolutions(const Report& report, const InstructionSet& isa, const char* name, size_t rows) {
  const ConvolutionLayer layer = convolution_layer(kBins, kDim, kDim, true);
  const size_t time = 4 * rows + 3;
  Random random(time);
  const auto x = random.numbers(time * kBins, 2.0f);
  std::vector<float> y(rows * layer.outer() * layer.out);
  report.add(name, static_cast<double>(y.size() * layer.depth()),
             [&] { run_convolutions(isa, layer, x.data(), 1, time, y.data(), Serial()); });
}

}  // namespace
}  // namespace u2moe

int main(int count, char** arguments) {
  using namespace u2moe;
  const char* message = nullptr;
  const InstructionSet* chosen = instruction_set(&message);
  if (chosen == nullptr) return std::fprintf(stderr, "%s\n", message), 1;
  const InstructionSet& isa = *chosen;
  const Report report(isa, count > 1 ? std::atof(arguments[1]) : 1.0);
  measure_linear(report, isa, "linear, 16 rows", kChunk);
  measure_linear(report, isa, "linear, 250 rows", kTenSeconds);
  measure_experts(report, isa, "feed-forward, 16 rows", 1, 0, kChunk);
  measure_experts(report, isa, "feed-forward, 250 rows", 1, 0, kTenSeconds);
  measure_experts(report, isa, "2 of 8 experts, int8, 16 rows", 8, 0, kChunk);
  measure_experts(report, isa, "2 of 8 experts, int4, 16 rows", 8, 32, kChunk);
  measure_experts(report, isa, "2 of 8 experts, int8, 250 rows", 8, 0, kTenSeconds);
  measure_experts(report, isa, "2 of 8 experts, int4, 250 rows", 8, 32, kTenSeconds);
  measure_convolutions(report, isa, "first convolutions, 250 frames", kTenSeconds);
  return 0;
}
