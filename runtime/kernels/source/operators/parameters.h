// Attributes and constant inputs of operators, and packing of weights.
//
// An operator is a class. Its constructor runs when a session is created, and reads attributes and constant inputs. Its
// `compute` runs when the session runs.
#pragma once
#include <string>
#include <vector>

#include "../layout.h"
#include "../ort.h"

namespace u2moe {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr int64_t kMostElements = int64_t{1} << 31;

// Returns the instruction set of this process. Throws if U2MOE_KERNELS_ISA names an unknown or unavailable one.
const InstructionSet& isa();

// Returns the activation with this name; throws if there is none. `lowest_of_rows` also accepts "" for no activation.
Activation activation_named(const std::string& name);
float lowest_of(Activation activation);
float lowest_of_rows(const std::string& name);
size_t size_of(const Node& node, const char* name);

// ------------------------------------------------------------------------------------------------ weights

size_t packed_bytes(size_t k, size_t n, size_t group);

// A weight matrix as the graph stores it, before packing.
struct Matrix {
  Int8Weight eight{};
  Int4Weight four{};
  size_t k = 0, n = 0, group = 0;

  size_t bytes() const { return packed_bytes(k, n, group); }
  void pack(uint8_t* to) const { group ? pack4(four, to) : pack8(eight, to); }
};

// Returns the number of rows in a group of 4-bit weights.
size_t group_of(const Node& node);
// Read a weight with its scale and bias, and for a 4-bit weight also its steps. -1 for `k` or `n` allows any size, but
// a 4-bit weight needs `k`.
Matrix read_int8(Node& node, int64_t k, int64_t n, bool bias);
Matrix read_int4(Node& node, int64_t k, int64_t n, size_t group, bool bias);

// Returns whether weights were packed in advance, by `u2moe quantize --packed`.
bool is_packed(const Node& node);
LinearLayer read_linear(Node& node, bool bias, float lowest, size_t group = 0);

// Throws if sums over `k` products would not fit in 32 bits.
void check_inner(size_t k);
// Throws if the node has inputs that have not been read.
void check_all_read(const Node& node);

}  // namespace u2moe
