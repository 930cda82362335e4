// What the passes of attention share.
#pragma once
#include "block.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
// Of a tile; a warp has 16 of them.
constexpr int QUERIES = 16 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f;

// Where a row's tokens lie. prefix_length is 0 without a prefix; the rows that go on after this one follow one after the other.
struct Row {
  int start, length, prefix_start, prefix_length, first_follower, followers;
};

// 64 tokens of a row, from its own token `first` on: as queries, or as keys.
struct Tile {
  int row, first;
};

struct Attention {
  const Row* rows;
  const Tile* tiles;
  long long q_stride, kv_stride, y_stride, tokens;
  int group;  // query heads of a key-value head
  int window;
  float scale, cap;
};

// Elements from a row to the next in shared memory: 16 bytes more than a head has, so that eight rows lie in eight bank groups.
template <int D>
constexpr int STRIDE = D + 8;

// Copies `Rows` rows of one head to shared memory: token_of(i) tells where row i lies; below 0 it is zero.
template <int D, int Rows, class TokenOf>
__device__ __forceinline__ void copy_rows(bf16* to, const bf16* from, long long stride, TokenOf token_of) {
  constexpr int CHUNKS = D / 8;
  for (int i = threadIdx.x; i < Rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const long long token = token_of(row);
    copy_async16(to + row * STRIDE<D> + chunk * 8, from + max(token, 0ll) * stride + chunk * 8, token >= 0);
  }
}

// The token at a position of what a row sees: its prefix first. −1 behind the end.
__device__ __forceinline__ long long token_at(const Row& row, int position) {
  const int own = position - row.prefix_length;
  if (own >= row.length) return -1;
  return own < 0 ? row.prefix_start + position : row.start + own;
}

// Fragments for m16n8k16 of 16-row pieces of a tile in shared memory. Left: this warp's 16 rows, columns from 16 · step on.
template <int D>
__device__ __forceinline__ void left_fragment(uint32_t (&left)[1][4], const bf16* rows, int step) {
  const int lane = threadIdx.x % 32;
  load_matrix_x4(left[0], rows + lane % 16 * STRIDE<D> + step * 16 + lane / 16 * 8);
}

// Right, where the tile's rows are columns of the product: `Columns` rows, elements from 16 · step on.
template <int D, int Columns>
__device__ __forceinline__ void right_of_rows(uint32_t (&right)[Columns / 8][2], const bf16* rows, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < Columns / 16; pair++) {
    uint32_t both[4];
    const int row = pair * 16 + lane % 8 + lane / 16 * 8;
    load_matrix_x4(both, rows + row * STRIDE<D> + step * 16 + lane / 8 % 2 * 8);
    right[2 * pair][0] = both[0], right[2 * pair][1] = both[1];
    right[2 * pair + 1][0] = both[2], right[2 * pair + 1][1] = both[3];
  }
}

// Right, where 16 of the tile's rows are summed over, from row 16 · step on: all D columns.
template <int D>
__device__ __forceinline__ void right_of_columns(uint32_t (&right)[D / 8][2], const bf16* rows, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < D / 16; pair++) {
    uint32_t both[4];
    load_matrix_x4_transposed(both, rows + (step * 16 + lane % 16) * STRIDE<D> + pair * 16 + lane / 16 * 8);
    right[2 * pair][0] = both[0], right[2 * pair][1] = both[1];
    right[2 * pair + 1][0] = both[2], right[2 * pair + 1][1] = both[3];
  }
}

// sums += values · the tile's rows, where `values` are the accumulators of 16 rows by `Rows`.
template <int D, int Rows>
__device__ __forceinline__ void accumulate(float (&sums)[1][D / 8][4], const float (&values)[1][Rows / 8][4],
                                           const bf16* rows) {
#pragma unroll
  for (int step = 0; step < Rows / 16; step++) {
    const auto& low = values[0][2 * step];
    const auto& high = values[0][2 * step + 1];
    const uint32_t left[1][4] = {
        {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])}};
    uint32_t right[D / 8][2];
    right_of_columns<D>(right, rows, step);
    multiply_tile(sums, left, right);
  }
}

__device__ __forceinline__ bool is_seen(const Attention& a, int query, int key) {
  return key <= query && (!a.window || key > query - a.window);
}

// Of an accumulator of 16 rows: element e of tile j lies in row row_of(e) and column column_of(j, e).
__device__ __forceinline__ int row_of(int e) { return threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int j, int e) { return j * 8 + threadIdx.x % 4 * 2 + e % 2; }

// Writes 16 rows by D, times a factor of each half of the lane's rows, as bf16.
template <int D, class TokenOf>
__device__ __forceinline__ void write_rows(bf16* to, long long stride, const float (&values)[1][D / 8][4],
                                           const float (&factors)[2], TokenOf token_of) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const long long token = token_of(row_of(2 * half));
    if (token < 0) continue;
    bf16* row = to + token * stride + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      *reinterpret_cast<uint32_t*>(row + j * 8) =
          pack_bf16(values[0][j][2 * half] * factors[half], values[0][j][2 * half + 1] * factors[half]);
    }
  }
}

}  // namespace
