// How the tensor-core kernels of local attention bring columns to shared memory and find them there.
#pragma once

#include "cuda/local_attention_mma.cuh"

namespace natrpb::cuda::mma {

// Rows of kDim 16-bit channels in shared memory. Position `at` holds its 16-byte unit u at u ^ swizzle(at): any 8 positions
// that differ mod 8 then have their units u in different banks.
template <int kDim>
struct Staged {
  static constexpr int kUnits = kDim / 8;
  static constexpr int kSwap = kUnits < 8 ? kUnits - 1 : 7;  // largest power of two in kUnits, up to 8
  static constexpr int kShift = kUnits >= 8 ? 0 : kUnits == 4 ? 1 : kUnits == 2 ? 2 : 3;  // log2(8 / kUnits)
  static_assert((kUnits & (kUnits - 1)) == 0);

  // Positions times 2^kScale have the bits of the swizzle where an offset has those of its unit.
  static constexpr int kScale = 4 - kShift;
  static constexpr int kRowScale = 2 * kDim >> kScale;

  __device__ static int32_t offset_of_scaled(int32_t scaled, int32_t unit) {
    return scaled * kRowScale + ((scaled & (kSwap << 4)) ^ (unit << 4));
  }
  __device__ static int32_t offset(int32_t at, int32_t unit) { return offset_of_scaled(at << kScale, unit); }
};

// The 16-byte unit of every column's row that a thread copies, from two tensors, x to `shared`, y behind it.
template <int kDim>
struct Copy {
  static constexpr int kUnits = Staged<kDim>::kUnits;

  bool has_x, has_y;
  unsigned char *to_x, *to_y;

  static __device__ int32_t unit() { return threadIdx.x % kUnits; }

  __device__ Copy(const Params& p, int64_t x_channels, int64_t y_channels, unsigned char* shared)
      : has_x(unit() * 8 < x_channels),
        has_y(unit() * 8 < y_channels),
        to_x(shared),
        to_y(shared + p.tiling.positions * (kDim * 2)) {}

  // The units in rows of x and y; of a unit beyond the channels the row itself.
  __device__ const unsigned char* in_x(const unsigned char* row) const { return row + (has_x ? unit() * 16 : 0); }
  __device__ const unsigned char* in_y(const unsigned char* row) const { return row + (has_y ? unit() * 16 : 0); }

  __device__ void start(const unsigned char* x, const unsigned char* y, int32_t offset) const {
    ptx::cp_async_16(to_x + offset, x, has_x);
    ptx::cp_async_16(to_y + offset, y, has_y);
  }
};

// Starts copying the CTA's whole halo of tensors 0 and 1; the caller waits and synchronises. Warps take turns at lines of the
// halo where there are enough of them, else all threads at the columns of each.
template <int kDim>
__device__ void stage_halo(const Params& p, const CtaState& cta, int64_t x_channels, int64_t y_channels,
                           unsigned char* shared) {
  using Rows = Staged<kDim>;
  const Copy<kDim> copy(p, x_channels, y_channels, shared);
  const HaloSpan(&halo)[kAxes] = cta.place.halo;
  const int32_t planes = halo[0].count, lines = halo[1].count, columns = halo[2].count;
  const bool by_warp = planes * lines >= p.tiling.warps;
  const int32_t line_step = by_warp ? p.tiling.warps : 1;
  const int32_t column_step = (by_warp ? 32 : blockDim.x) / Rows::kUnits;
  const int32_t first_column = (by_warp ? threadIdx.x % 32 : threadIdx.x) / Rows::kUnits;
  const int32_t first[kAxes] = {halo[0].first, halo[1].first, halo[2].first + first_column};
  const int64_t (&x_step)[kAxes] = p.tensor[0].bytes.step, (&y_step)[kAxes] = p.tensor[1].bytes.step;
  int32_t plane = 0, line = by_warp ? threadIdx.x / 32 : 0;
  const unsigned char* x_line = copy.in_x(cta.at(p, 0, first)) + line * x_step[1];
  const unsigned char* y_line = copy.in_y(cta.at(p, 1, first)) + line * y_step[1];
  while (true) {
    for (; line >= lines && plane < planes; line -= lines) {  // NB: a CTA without tiles has no lines
      ++plane;
      x_line += x_step[0] - lines * x_step[1];
      y_line += y_step[0] - lines * y_step[1];
    }
    if (plane >= planes) break;
    const unsigned char *x = x_line, *y = y_line;
    int32_t at = plane * p.tiling.plane + line * p.tiling.pitch + first_column;
    int32_t offset = Rows::offset(at, copy.unit());
    for (int32_t column = first_column; column < columns; column += column_step) {
      copy.start(x, y, offset);
      x += column_step * x_step[2];
      y += column_step * y_step[2];
      at += column_step;
      constexpr bool kSameSwizzle = 32 / Rows::kUnits % 8 == 0;  // of positions column_step apart
      offset = kSameSwizzle ? offset + column_step * (kDim * 2) : Rows::offset(at, copy.unit());
    }
    line += line_step;
    x_line += line_step * x_step[1];
    y_line += line_step * y_step[1];
  }
  ptx::cp_async_commit();
}

// Copies one chunk of a tile's columns, for tiles whose columns do not fit as a whole. One warp.
template <int kDim>
__device__ void stage_chunk(const Params& p, const CtaState& cta, const Tile& tile, int32_t first_pair, int64_t x_channels,
                            int64_t y_channels, unsigned char* shared) {
  constexpr int kUnits = Staged<kDim>::kUnits;
  const Copy<kDim> copy(p, x_channels, y_channels, shared);
  const Box box = tile.columns();
  const int32_t begin = first_pair * kPairColumns;
  const int32_t end = static_cast<int32_t>(min_of(begin + kChunkPairs * kPairColumns, box.count));
  __syncwarp();
  for (int32_t j = begin + threadIdx.x / kUnits; j < end; j += 32 / kUnits) {
    int32_t i[kAxes];
    box.unravel(j, i);
    copy.start(copy.in_x(cta.at(p, 0, i)), copy.in_y(cta.at(p, 1, i)), Staged<kDim>::offset(j - begin, copy.unit()));
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
}

// Finds a tile's columns in shared memory, 16 at a time, for ldmatrix. Straight, columns are the product's n: registers 0, 1 are
// the lower eight's channels 0-7 and 8-15, registers 2, 3 the upper eight's. Transposed, columns are its k: registers 0, 1 are
// channels 0-7 of the lower and the upper eight, registers 2, 3 channels 8-15. Either way a lane gives the address of one row;
// prepare_kernel has laid out the positions of both, relative to the tile's first column, in the halves of a word.
template <int kDim>
struct Columns {
  const uint32_t* table;  // this lane's, [pairs, 32], from the pair that is next
  uint32_t base;          // scaled position of the tile's first column in both halves

  __device__ Columns(const Params& p, const Tile& tile)
      : table(p.columns + int64_t{tile.first_pair} * 32 + threadIdx.x % 32),
        base(static_cast<uint32_t>(tile.base) * (0x10001u << Staged<kDim>::kScale)) {}

  __device__ void advance(int32_t pairs) { table += pairs * 32; }
  // Scaled positions of the two columns whose rows this lane addresses.
  // NB: they fit 16 bits, since offsets are at least 8 times as large and shared memory is below 512 KiB.
  __device__ uint32_t find(int32_t pair) const { return (ptx::load_4(table + pair * 32) << Staged<kDim>::kScale) + base; }

  // Offsets of the rows in shared memory; those of further channels: xor with 32 per 16.
  static __device__ int32_t straight(uint32_t found) {
    return Staged<kDim>::offset_of_scaled(static_cast<int32_t>(found & 0xffff), threadIdx.x / 8 % 2);
  }
  static __device__ int32_t transposed(uint32_t found) {
    return Staged<kDim>::offset_of_scaled(static_cast<int32_t>(found >> 16), threadIdx.x % 32 / 16);
  }
};
__device__ __forceinline__ int32_t straight_column(int32_t lane) { return lane / 16 * 8 + lane % 8; }
__device__ __forceinline__ int32_t transposed_column(int32_t lane) { return lane % 16; }

}  // namespace natrpb::cuda::mma
