// Table of the functions that differ between instruction sets. All other code is compiled once.
#pragma once
#include <cstddef>
#include <cstdint>

#include "declared.h"

namespace u2moe {

// Arguments for rounding rows of activations to integers, with one scale per row.
struct Rounding8 {
  const float* x;  // [rows, k]
  size_t k;
  float lowest;  // the peak of a row is raised to at least the magnitude of this
  void* codes;   // [rows, stride]: x / scale, rounded
  size_t stride;
  float* scale;  // [rows]: peak * kStep
};

enum class Then { linear, hidden, gated, scatter };

// Arguments of a product of rows with packed weights. `then` determines how elements are processed. In these formulas,
// `unit` is an element of the product times the scale of its column, and `scale` is the scale of its row:
// linear: out = unit * scale + bias
// hidden: out = activation(unit * scale + bias)
// gated: out *= unit * scale + bias
// scatter: out[token] += unit * scale + share * bias
struct Product {
  const void* codes;  // [rows, stride]
  size_t stride, rows;
  const uint8_t* weights;
  size_t k, n;
  const float* scale;  // [rows]; null: 1
  Then then;
  Activation activation;
  float* out;  // [rows or tokens, out_stride]
  size_t out_stride;
  const uint32_t* token;  // [rows]
  const float* share;     // [rows]
  const uint8_t* next;  // bytes to prefetch if there are several tiles of rows; null: the next block
  const uint8_t* after;  // bytes to prefetch at the last block if there is one tile; null: the bytes after the block
  // The rest is only for int4.
  size_t group;
  uint8_t* room;  // space for kUnpacked blocks in int8
};

struct Routing {
  const float* x;     // [tokens, dim]
  const float* gate;  // [dim, experts rounded up to whole panels], zeros beyond the experts
  size_t dim, experts, top_k;
  uint32_t* expert;  // [tokens, top_k]
  float* share;      // [tokens, top_k]
};
constexpr size_t kMostExperts = 1024;

// Arguments of attention. Keys and values come from a cache and from this call. Strides are in elements; the stride of
// an axis of size 1 is 0.
struct Attention {
  size_t batch, time, heads, kv_heads, size;  // `size` is the size of a head
  size_t num_past;
  const float* query;      // [batch, time, heads * size]
  const float* key_value;  // [batch, time, kv_heads * 2 * size]
  const float* past;       // [batch, kv_heads, num_past, 2 * size]
  const float* positions;  // [batch, keys, heads * size], added to the keys; null: none
  size_t positions_batch_stride;
  const float* bias;  // [batch, heads, time, keys], added to the scores
  size_t bias_batch_stride, bias_head_stride, bias_time_stride;
  float* out;  // [batch, time, heads * size]
};

// Arguments of the first convolution, computed in floats for one frame. The output is quantized to the range from 0 to
// 255, with one scale, because it is the input of the next convolution.
struct Convolution {
  const float* patches;  // [positions, taps]
  const float* weights;  // panels of 16 channels: [taps, 16]
  size_t positions, taps, channels;
  void* codes;  // [positions, channels]
  float* scale;
};

// Arguments of layer normalisation, which is applied to each row of `x`. The rows of `branch`, if any, are added first.
struct Normalization {
  const float* x;       // [rows, size]
  const float* branch;  // [rows, size], added to x; null: none
  const float* weight;  // [size]
  const float* bias;    // [size]
  size_t size;
  float epsilon;
  float* sum;  // [rows, size], with a branch
  float* out;  // [rows, size]
};

// Arguments of the convolution module of a streamed block, without its projections. The module consists of a gated
// linear unit, a depthwise convolution over time that also sees cached frames, and an optional normalisation and
// activation. `width` is the number of channels, rounded up to whole panels.
struct TimeConvolution {
  size_t batch, time, channels, kernel, width;
  const float* linear;  // [batch, time, channels]
  const float* gate;    // [batch, time, channels]
  const float* past;    // [batch, kernel - 1, channels]
  const float* weight;  // [kernel, width]
  const float* bias;    // [width]
  const float* norm_weight;  // [channels]; null: no normalisation
  const float* norm_bias;    // [channels]
  float epsilon;
  bool is_activated;
  Activation activation;
  float* seen;  // [batch, kernel - 1 + time, width]: input of the convolution
  float* out;   // [batch, time, channels]
};

struct InstructionSet {
  const char* name;
  size_t code_bytes;  // bytes of a rounded activation
  void (*round8)(const Rounding8&, size_t first_row, size_t last_row);
  void (*round_bytes)(const Rounding8&, size_t first_row, size_t last_row);  // to uint8 around 128, for graphs
  void (*from_bytes)(const uint8_t* bytes, size_t k, void* codes, size_t stride, size_t rows);
  void (*multiply8)(const Product&, size_t first_block, size_t last_block);
  void (*multiply4)(const Product&, size_t first_block, size_t last_block);
  void (*route)(const Routing&, size_t first_token, size_t last_token);
  bool holds_255;  // whether activations may range from 0 to 255
  bool has_byte_codes;  // whether activations are uint8 around 128, as in graphs
  // `sums` has room for positions * channels floats, rounded up to panels
  void (*convolve)(const Convolution&, float* sums);
  void (*attend)(const Attention&, size_t head_of_batch, float* scratch);  // scratch has `attention_scratch` floats
  void (*normalize)(const Normalization&, size_t first_row, size_t last_row);
  void (*see)(const TimeConvolution&, size_t first, size_t last);               // rows of `seen`
  void (*convolve_in_time)(const TimeConvolution&, size_t first, size_t last);  // rows of `out`
};

// Returns the instruction set that the environment names, or else the best one of this processor. If the named one is
// unknown or not available, returns null and sets a message.
const InstructionSet* instruction_set(const char** message);

// Lists all instruction sets of this processor, best first; returns their number.
size_t available(const InstructionSet* (&sets)[8]);

constexpr float kStep = 1.0f / 127;

}  // namespace u2moe
