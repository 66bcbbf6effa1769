// oneDNN's int8 products of one expert, uint8 around 128 by int8 with a scale for each column, weights reordered before:
//   onednn ROWS DIM HIDDEN COPIES  ->  seconds of both products, averaged over copies of the weights in turn
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

namespace {

using Memory = dnnl::memory;
using Tag = Memory::format_tag;

constexpr double kLeast = 0.2;  // seconds of a measurement

// A product [rows, k] by [k, n] with as many weights as there are copies.
class Product {
 public:
  Product(const dnnl::engine& engine, dnnl::stream& stream, long rows, long k, long n, size_t copies)
      : scales_(static_cast<size_t>(n), 0.001f), zero_{128}, x_(static_cast<size_t>(rows * k), 130),
        y_(static_cast<size_t>(rows * n)) {
    dnnl::primitive_attr attributes;
    attributes.set_scales_mask(DNNL_ARG_WEIGHTS, 2);
    attributes.set_zero_points_mask(DNNL_ARG_SRC, 0);
    const Memory::desc x({rows, k}, Memory::data_type::u8, Tag::ab), any({k, n}, Memory::data_type::s8, Tag::any),
        y({rows, n}, Memory::data_type::f32, Tag::ab);
    const dnnl::matmul::primitive_desc description(engine, x, any, y, attributes);
    product_ = dnnl::matmul(description);
    std::vector<int8_t> plain(static_cast<size_t>(k * n));
    for (size_t i = 0; i < plain.size(); i++) plain[i] = static_cast<int8_t>(i * 2654435761u >> 24);
    Memory from({{k, n}, Memory::data_type::s8, Tag::ab}, engine, plain.data());
    for (size_t i = 0; i < copies; i++) {
      Memory weights(description.weights_desc(), engine);
      dnnl::reorder(from, weights).execute(stream, from, weights);
      stream.wait();
      arguments_.push_back({{DNNL_ARG_SRC, Memory(x, engine, x_.data())},
                            {DNNL_ARG_WEIGHTS, weights},
                            {DNNL_ARG_DST, Memory(y, engine, y_.data())},
                            {DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS,
                             Memory({{n}, Memory::data_type::f32, Tag::a}, engine, scales_.data())},
                            {DNNL_ARG_ATTR_ZERO_POINTS | DNNL_ARG_SRC,
                             Memory({{1}, Memory::data_type::s32, Tag::a}, engine, zero_)}});
    }
  }
  void run(dnnl::stream& stream, size_t copy) { product_.execute(stream, arguments_[copy]); }

 private:
  std::vector<float> scales_;
  int32_t zero_[1];
  std::vector<uint8_t> x_;
  std::vector<float> y_;
  dnnl::matmul product_;
  std::vector<std::unordered_map<int, Memory>> arguments_;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int main(int count, char** words) {
  if (count != 5) return std::fprintf(stderr, "onednn ROWS DIM HIDDEN COPIES\n"), 2;
  const long rows = std::atol(words[1]), dim = std::atol(words[2]), hidden = std::atol(words[3]);
  const auto copies = static_cast<size_t>(std::atol(words[4]));
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  Product first(engine, stream, rows, dim, hidden, copies), second(engine, stream, rows, hidden, dim, copies);
  size_t done = 0;
  const auto all = [&] {
    for (size_t copy = 0; copy < copies; copy++, done++) {
      first.run(stream, copy);
      second.run(stream, copy);
    }
    stream.wait();
  };
  all();
  done = 0;
  const double begin = now();
  while (now() - begin < kLeast) all();
  std::printf("%.9f\n", (now() - begin) / static_cast<double>(done));
  return 0;
}
