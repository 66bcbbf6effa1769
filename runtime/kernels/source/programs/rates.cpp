// How near do the layers come to what the processor can multiply? Prints how many products a second its instruction for
// integers makes of registers alone, and beside it those of layers of the sizes of MoE-1B, on the best instruction set.
// Times are the processor's, of one thread, the least of many runs: they hold on a machine that others use, too.
//
//     u2moe_kernels_rates [SECONDS OF EACH]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <vector>

#include "cases.h"

namespace u2moe {
namespace {

constexpr size_t kDim = 576, kHidden = 1920, kBins = 80;
constexpr size_t kChunk = 16, kTenSeconds = 250;  // rows
constexpr size_t kRunsAtLeast = 3;

double processor_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

double least_seconds(double budget, const std::function<void()>& run) {
  double least = 1e30, used = 0;
  run();  // memory and caches
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
    most_ > 0 ? std::printf("registers alone %.0f products a nanosecond\n", most_ * 1e-9)
              : std::printf("products of registers alone are not measured\n");
  }

  void add(const char* name, double products, const std::function<void()>& run) const {
    const double seconds = least_seconds(budget_, run), rate = products / seconds;
    std::printf("%-40s %9.1f us %6.0f products a ns", name, seconds * 1e6, rate * 1e-9);
    if (most_ > 0) std::printf(" %5.0f %%", 100 * rate / most_);
    std::printf("\n");
    std::fflush(stdout);
  }

 private:
  // With AVX-512 VNNI, of 28 sums as a tile has them; 0 with others.
  static double most_products(const InstructionSet& isa, double budget);

  double budget_, most_;
};

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) void multiply_registers(long rounds) {
  asm volatile(
      "1:\n\t"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27\n\t"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm\\i\n\t"
      ".endr\n\t"
      "dec %0\n\t"
      "jnz 1b"
      : "+r"(rounds)
      :
      : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
        "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24",
        "zmm25", "zmm26", "zmm27");
}

double Report::most_products(const InstructionSet& isa, double budget) {
  constexpr long kRounds = 100000;  // about a millisecond, as long as a layer
  if (std::strcmp(isa.name, "avx512-vnni") != 0) return 0;
  return kRounds * 28.0 * 64.0 / least_seconds(budget, [] { multiply_registers(kRounds); });
}
#else
double Report::most_products(const InstructionSet&, double) { return 0; }
#endif

void measure_experts(const Report& report, const InstructionSet& isa, const char* name, size_t experts, size_t group,
                     size_t rows) {
  Random random(rows);
  const Case c{kDim, kHidden, experts, experts > 1 ? size_t{2} : size_t{1}, group, rows, Activation::swish};
  ExpertLayer layer = expert_layer(c, random);
  if (experts == 1) layer.router = Weights();
  const auto x = random.numbers(rows * kDim, 2.0f);
  std::vector<float> y(x.size());
  report.add(name, 2.0 * static_cast<double>(rows * c.top_k * kDim * kHidden),
             [&] { run_experts(isa, layer, x.data(), rows, y.data(), Serial()); });
}

void measure_linear(const Report& report, const InstructionSet& isa, const char* name, size_t rows) {
  Random random(rows);
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
  const ConvolutionLayer layer = convolution_layer(kBins, kDim, kDim);
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
  const InstructionSet* sets[8];
  available(sets);
  const InstructionSet& isa = *sets[0];
  const Report report(isa, count > 1 ? std::atof(arguments[1]) : 1.0);
  measure_linear(report, isa, "linear, 16 rows", kChunk);
  measure_linear(report, isa, "linear, 250 rows", kTenSeconds);
  measure_experts(report, isa, "feed-forward, 16 rows", 1, 0, kChunk);
  measure_experts(report, isa, "feed-forward, 250 rows", 1, 0, kTenSeconds);
  measure_experts(report, isa, "2 of 8 experts, int8, 250 rows", 8, 0, kTenSeconds);
  measure_experts(report, isa, "2 of 8 experts, int4, 250 rows", 8, 32, kTenSeconds);
  measure_convolutions(report, isa, "first convolutions, 250 frames", kTenSeconds);
  return 0;
}
