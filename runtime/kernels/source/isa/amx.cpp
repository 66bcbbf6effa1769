// AMX. For more than a few rows, tiles compute the int8 products. Everything else is the same as with AVX-512 VNNI.
#include "../loops.h"
#include "../vectors/amx.h"
#include "../vectors/avx512.h"

namespace u2moe {
namespace {

constexpr size_t kTileRows = 16, kDepth = 64;  // rows and columns of a tile of activations
constexpr size_t kFewRows = 6;                 // up to this many rows, vectors are as fast as tiles: memory limits both

// Intel's own prefetching does not keep up: without this, a layer takes 1.25 times as long at 16 rows.
struct Vectors : Avx512 {
  using Wide = Vectors;
  static constexpr ptrdiff_t kFar8 = 8192;
};

// Up to 32 rows, which two tiles multiply at once. If they do not fill the tiles, the tiles overlap, or they also hold
// rows of the group before.
struct Group {
  size_t first, rows, skipped;  // the first `skipped` rows belong to the group before
};

Group group_at(size_t row, size_t rows) {
  const size_t left = rows - row;
  if (left >= 2 * kTileRows) return {row, 2 * kTileRows, 0};
  if (left > kTileRows || rows <= kTileRows) return {row, left, 0};
  return {rows - kTileRows, kTileRows, kTileRows - left};
}

// Sums of products for a group and one block of weights. They are finished while tiles multiply what comes next.
struct Sums {
  alignas(64) int32_t values[2 * kTileRows * kBlock];
  Group group;
  const uint8_t* constants;  // constants of the block
  size_t column;             // first column of the block

  void finish_rows(const Product& p, size_t from, size_t to) const {
    if (p.then == Then::linear) return finish_as<Then::linear>(p, from, to);
    if (p.then == Then::hidden) return finish_as<Then::hidden>(p, from, to);
    if (p.then == Then::gated) return finish_as<Then::gated>(p, from, to);
    finish_as<Then::scatter>(p, from, to);
  }

  template <Then kThen>
  void finish_as(const Product& p, size_t from, size_t to) const {
    const auto* scales = reinterpret_cast<const float*>(constants);
    const size_t columns = p.n - column < kBlock ? p.n - column : kBlock;
    for (size_t m = from; m < to; m++) {
      const size_t row = group.first + m;
      const auto scale = Vectors::set(p.scale ? p.scale[row] : 1.0f);
      float* out = row_of(p, row) + column;
      for (size_t c = 0; c < columns; c += kPanel) {
        const auto sum = Vectors::to_float(Vectors::loadi(values + m * kBlock + c));
        const auto unit = Vectors::mul(sum, Vectors::load(scales + c)), bias = Vectors::load(scales + 2 * kBlock + c);
        finish_vector<Vectors>(p, kThen, row, unit, scale, bias, out + c, columns - c);
      }
    }
  }
};

// Multiplies a group by one block. Tiles 0 to 3 hold sums, tiles 4 and 5 hold activations, and tiles 6 and 7 hold
// weights. `second` is the first row of the second tile, if there is one. `between` does other work in each step.
template <bool kHasSecond, class Between>
inline void sums_of_block(const uint8_t* codes, size_t stride, size_t second, const uint8_t* weights, size_t depth,
                          int32_t* sums, Between&& between) {
  const uint8_t* start = weights + depth * kBlock + kBlock * 4;  // sums start with the corrections, in every row
  U2MOE_TILE_LOAD(0, start, 0);
  U2MOE_TILE_LOAD(1, start + kPanel * 4, 0);
  if constexpr (kHasSecond) {
    U2MOE_TILE_LOAD(2, start, 0);
    U2MOE_TILE_LOAD(3, start + kPanel * 4, 0);
  }
  for (size_t k = 0; k < depth; k += kDepth) {
    const uint8_t* own = weights + k * kBlock;
    U2MOE_TILE_LOAD(6, own, kBlock * 4);
    U2MOE_TILE_LOAD(7, own + kPanel * 4, kBlock * 4);
    U2MOE_TILE_LOAD(4, codes + k, stride);
    if constexpr (kHasSecond) U2MOE_TILE_LOAD(5, codes + second * stride + k, stride);
    U2MOE_TILE_DOT(0, 4, 6);
    U2MOE_TILE_DOT(1, 4, 7);
    if constexpr (kHasSecond) {
      U2MOE_TILE_DOT(2, 5, 6);
      U2MOE_TILE_DOT(3, 5, 7);
    }
    between();
  }
  U2MOE_TILE_STORE(0, sums, kBlock * 4);
  U2MOE_TILE_STORE(1, sums + kPanel, kBlock * 4);
  if constexpr (kHasSecond) {
    U2MOE_TILE_STORE(2, sums + second * kBlock, kBlock * 4);
    U2MOE_TILE_STORE(3, sums + second * kBlock + kPanel, kBlock * 4);
  }
}

void configure(size_t rows) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) {
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = static_cast<uint8_t>(t < 6 && rows < kTileRows ? rows : kTileRows);
  }
  U2MOE_TILES_CONFIGURE(shapes);
}

void multiply_tiles(const Product& p, size_t first, size_t last) {
  if (p.rows <= kFewRows) return multiply8<Vectors>(p, first, last);
  const auto* codes = static_cast<const uint8_t*>(p.codes);
  const size_t depth = depth8(p.k), bytes = block_bytes8(p.k);
  const size_t next_bytes = p.next ? block_bytes4(p.k, p.group) : bytes;
  const size_t groups = (p.rows + 2 * kTileRows - 1) / (2 * kTileRows), steps = depth / kDepth;
  const size_t lines = next_bytes / kLine / (groups * steps) + 1;  // of the next block, prefetched in each step
  Sums sums[2];                                                    // sums of this group and of the previous one
  sums[1].group = {};
  int now = 0;
  configure(p.rows);
  for (size_t block = first; block < last; block++) {
    const uint8_t* weights = p.weights + block * bytes;
    const uint8_t* ahead = p.next ? p.next + (block - first) * next_bytes
                           : block + 1 == last && p.after ? p.after : weights + bytes;
    // All groups use a block before the next one is used, so that it is read from memory while tiles multiply.
    for (size_t row = 0; row < p.rows; row += 2 * kTileRows, now = 1 - now) {
      Sums& own = sums[now];
      const Sums& before = sums[1 - now];
      const size_t rows = before.group.rows;
      size_t done = before.group.skipped;
      const size_t each = (rows - done + steps - 1) / steps;  // rows that each step finishes
      const auto between = [&] {
        for (size_t i = 0; i < lines; i++, ahead += kLine) U2MOE_PREFETCH(ahead, 2);
        const size_t to = rows - done < each ? rows : done + each;
        before.finish_rows(p, done, to);
        done = to;
      };
      own.group = group_at(row, p.rows);
      own.constants = weights + depth * kBlock;
      own.column = block * kBlock;
      const uint8_t* from = codes + own.group.first * p.stride;
      if (own.group.rows > kTileRows)
        sums_of_block<true>(from, p.stride, own.group.rows - kTileRows, weights, depth, own.values, between);
      else
        sums_of_block<false>(from, p.stride, 0, weights, depth, own.values, between);
    }
  }
  const Sums& rest = sums[1 - now];
  rest.finish_rows(p, rest.group.skipped, rest.group.rows);
  U2MOE_TILES_RELEASE();
}

constexpr InstructionSet with_tiles() {
  InstructionSet set = loops_of<Vectors>("amx");
  set.multiply8 = multiply_tiles;
  set.multiply4 = multiply4<Vectors, multiply_tiles>;
  return set;
}

}  // namespace

extern const InstructionSet kAmx;
const InstructionSet kAmx = with_tiles();
}  // namespace u2moe
