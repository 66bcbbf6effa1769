// AMX tiles: eight registers, each with up to 16 rows of 64 bytes. With U2MOE_AMX_EMULATED, plain C++ emulates them for
// tests on other processors.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(U2MOE_AMX_EMULATED)
struct Tiles {
  static inline thread_local TileShapes shapes;
  static inline thread_local uint8_t data[8][16][64];

  static void configure(const TileShapes& wanted) { shapes = wanted; }
  static void release() {}
  template <int T>
  static void zero() { std::memset(data[T], 0, sizeof data[T]); }
  template <int T>
  static void load(const void* from, size_t stride) {
    for (size_t r = 0; r < shapes.rows[T]; r++)
      std::memcpy(data[T][r], static_cast<const uint8_t*>(from) + r * stride, shapes.row_bytes[T]);
  }
  template <int T>
  static void store(void* to, size_t stride) {
    for (size_t r = 0; r < shapes.rows[T]; r++)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, data[T][r], shapes.row_bytes[T]);
  }
  template <int C, int A, int B>
  static void dot() {
    for (size_t m = 0; m < shapes.rows[A]; m++)
      for (size_t n = 0; n < 16; n++) {
        uint32_t sum;  // wraps around
        std::memcpy(&sum, &data[C][m][4 * n], 4);
        for (size_t k = 0; k < 64; k++)
          sum += static_cast<uint32_t>(data[A][m][k] * static_cast<int8_t>(data[B][k / 4][4 * n + k % 4]));
        std::memcpy(&data[C][m][4 * n], &sum, 4);
      }
  }
};
#define U2MOE_TILES_CONFIGURE(shapes) Tiles::configure(shapes)
#define U2MOE_TILES_RELEASE() Tiles::release()
#define U2MOE_TILE_ZERO(t) Tiles::zero<t>()
#define U2MOE_TILE_LOAD(t, from, stride) Tiles::load<t>(from, stride)
#define U2MOE_TILE_STORE(t, to, stride) Tiles::store<t>(to, stride)
#define U2MOE_TILE_DOT(c, a, b) Tiles::dot<c, a, b>()
#else
// GCC's intrinsics paste tile numbers into the text of instructions, so these are macros instead of functions.
#define U2MOE_TILES_CONFIGURE(shapes) _tile_loadconfig(&(shapes))
#define U2MOE_TILES_RELEASE() _tile_release()
#define U2MOE_TILE_ZERO(t) _tile_zero(t)
#define U2MOE_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define U2MOE_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define U2MOE_TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)
#endif

}  // namespace
