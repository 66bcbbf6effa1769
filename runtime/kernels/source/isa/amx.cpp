// AMX. For more than a few rows, tiles compute the int8 products. Everything else is the same as with AVX-512 VNNI.
#include "../loops.h"
#include "../vectors/amx.h"
#include "../vectors/avx512.h"

namespace u2moe {
namespace {

constexpr size_t kTileRows = 16, kDepth = 64;  // rows and columns of a tile of activations
constexpr size_t kFewRows = 6;                 // up to this many rows, vectors are as fast as tiles: memory limits both

// Sums of products for up to 32 rows and one block of weights. They are finished while tiles multiply the next block.
struct Sums {
  alignas(64) int32_t values[2 * kTileRows * kBlock];
  const uint8_t* constants;  // constants of the block
  size_t first;              // first column of the block

  void finish_rows(const Product& p, size_t row, size_t from, size_t to) const {
    for (size_t m = from; m < to; m++) {
      alignas(64) float unit[kBlock];
      for (size_t c = 0; c < kBlock; c += kPanel) {
        const auto scale = Avx512::load(reinterpret_cast<const float*>(constants) + c);
        const auto start = Avx512::loadi(reinterpret_cast<const int32_t*>(constants + kBlock * 4) + c);
        const auto sum = Avx512::addi(Avx512::loadi(values + m * kBlock + c), start);
        Avx512::store(unit + c, Avx512::mul(Avx512::to_float(sum), scale));
      }
      const auto* bias = reinterpret_cast<const float*>(constants + kBlock * 8);
      finish<Avx512>(p, row + m, 1, first, kBlock, unit, bias);
    }
  }
};

// Multiplies `kPairs` tiles of 16 rows by one block. Tiles 0 to 3 hold sums, tiles 4 and 5 hold activations,
// and tiles 6 and 7 hold weights. `between` does other work in each step. If `is_first`, weights are prefetched from
// memory. For later rows, they are already in the cache.
template <int kPairs, class Between>
inline void sums_of_block(const uint8_t* codes, size_t stride, const uint8_t* weights, size_t depth, int32_t* sums,
                          bool is_first, Between&& between) {
  U2MOE_TILE_ZERO(0);
  U2MOE_TILE_ZERO(1);
  if constexpr (kPairs == 2) {
    U2MOE_TILE_ZERO(2);
    U2MOE_TILE_ZERO(3);
  }
  for (size_t k = 0; k < depth; k += kDepth) {
    const uint8_t* own = weights + k * kBlock;
    if (is_first)
      for (size_t i = 0; i < kDepth * kBlock; i += 64) U2MOE_PREFETCH(own + kNear + i, 3);
    U2MOE_TILE_LOAD(4, codes + k, stride);
    U2MOE_TILE_LOAD(6, own, kBlock * 4);
    U2MOE_TILE_DOT(0, 4, 6);
    U2MOE_TILE_LOAD(7, own + kPanel * 4, kBlock * 4);
    U2MOE_TILE_DOT(1, 4, 7);
    if constexpr (kPairs == 2) {
      U2MOE_TILE_LOAD(5, codes + kTileRows * stride + k, stride);
      U2MOE_TILE_DOT(2, 5, 6);
      U2MOE_TILE_DOT(3, 5, 7);
    }
    between();
  }
  U2MOE_TILE_STORE(0, sums, kBlock * 4);
  U2MOE_TILE_STORE(1, sums + kPanel, kBlock * 4);
  if constexpr (kPairs == 2) {
    U2MOE_TILE_STORE(2, sums + kTileRows * kBlock, kBlock * 4);
    U2MOE_TILE_STORE(3, sums + kTileRows * kBlock + kPanel, kBlock * 4);
  }
}

void configure(size_t first_rows, size_t second_rows) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) {
    const bool second = t == 2 || t == 3 || t == 5;
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = static_cast<uint8_t>(t > 5 ? kTileRows : second ? second_rows : first_rows);
  }
  U2MOE_TILES_CONFIGURE(shapes);
}

void multiply_tiles(const Product& p, size_t first, size_t last) {
  if (p.rows <= kFewRows) return multiply8<Avx512>(p, first, last);
  const auto* codes = static_cast<const uint8_t*>(p.codes);
  const size_t depth = depth8(p.k), bytes = block_bytes8(p.k);
  Sums sums[2];  // sums of this block and of the previous one
  // The outer loop runs over rows. Tile shapes then change only from one group of rows to the next, and the activations
  // of a group stay in the cache.
  for (size_t row = 0; row < p.rows; row += 2 * kTileRows) {
    const size_t rows = p.rows - row < 2 * kTileRows ? p.rows - row : 2 * kTileRows;
    const uint8_t* own = codes + row * p.stride;
    const size_t each = (rows * kDepth + depth - 1) / depth;  // rows of the previous block that each step finishes
    configure(rows < kTileRows ? rows : kTileRows, rows > kTileRows ? rows - kTileRows : kTileRows);
    for (size_t block = first; block < last; block++) {
      const uint8_t* weights = p.weights + block * bytes;
      Sums& now = sums[block % 2];
      const Sums& before = sums[1 - block % 2];
      const size_t waiting = block > first ? rows : 0;
      size_t done = 0;
      const auto between = [&] {
        const size_t to = waiting - done < each ? waiting : done + each;
        before.finish_rows(p, row, done, to);
        done = to;
      };
      now.constants = weights + depth * kBlock;
      now.first = block * kBlock;
      rows > kTileRows ? sums_of_block<2>(own, p.stride, weights, depth, now.values, row == 0, between)
                       : sums_of_block<1>(own, p.stride, weights, depth, now.values, row == 0, between);
    }
    if (last > first) sums[(last - 1) % 2].finish_rows(p, row, 0, rows);
  }
  U2MOE_TILES_RELEASE();
}

constexpr InstructionSet with_tiles() {
  InstructionSet set = loops_of<Avx512>("amx");
  set.multiply8 = multiply_tiles;
  set.multiply4 = multiply4<Avx512, multiply_tiles, kFewRows>;
  return set;
}

}  // namespace

extern const InstructionSet kAmx;
const InstructionSet kAmx = with_tiles();
}  // namespace u2moe
