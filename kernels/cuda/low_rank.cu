// The products of LoRA (Hu et al., 2021) that have a narrow side: y = x·Wᵀ + scale · (x·Aᵀ)·Bᵀ, and its gradients.
// T tokens; R = 16, 32, 48 or 64, the rank, padded with zeros. `matrix` is bf16 [T, width], its rows a stride apart: x, y, or a gradient of
// one of them. A factor is bf16 [R, width] (A) or [width, R] (B), without gaps. h: bf16 [T, R], rows a stride apart: one adapter's, or some
// columns of a wider h whose factors A lie one below the other, so that x is read once for all of them. width and strides are multiples of 8.
//
//   down      h = scale · matrix · factor      A: h = x·Aᵀ               B: dh = scale · dy·B
//   up        matrix += scale · h · factor     B: y += scale · h·Bᵀ      A: dx += dh·A
//   gradient  of a factor, f32, is added to    A: dA += dhᵀ·x            B: dB += scale · dyᵀ·h
//
// Bytes: 2 · T · width for down and gradient, 4 · T · width for up; h and the factors come from L2 mostly. FLOPs: 2 · T · width · R, at
// most 64 a byte, of which tensor cores can do more than memory delivers on each of the cards: all three are bound by memory.
//
// Down and up: a block takes 128 tokens and walks over columns, 64 at a time. Gradient: a block takes 128 columns and walks over tokens, 64
// at a time. A warp has 32 rows of the product, so that the narrow side is read from shared memory four times, and not eight. Two tiles
// are on their way while one is used: 32 KiB, which at an H100's bandwidth cover 1.3 µs if each multiprocessor has one block.
//
// Where there are fewer tiles than multiprocessors, the walk is split over grid.y. Parts of a sum are then stored in f32, and another kernel
// adds them in their order. Smaller tiles would fill a card without parts, but each tile reads the whole factor: with 32 tokens a tile
// that is twice the bytes of x, at R = 64, while a part has 4 · R bytes for a token.
#include "attention.cuh"

namespace {

// Where the rank of a factor is: [R, width], or [width, R].
enum Factor { A, B };

struct LowRank {
  long long stride, h_stride, tokens;
  int width;
  float scale;
};

// Rows of the product: of a warp, and of a block.
constexpr int WARP_ROWS = 32;
constexpr int ROWS = WARPS * WARP_ROWS;
// Tokens or columns that are taken at a time.
constexpr int DEPTH = 64;
constexpr int STAGES = 3;

// A tile of the matrix, and what meets it: of a factor or of h.
template <int MatrixRows, int MatrixColumns, int OtherRows, int OtherColumns>
struct Memory {
  bf16 matrix[STAGES][MatrixRows * STRIDE<MatrixColumns>];
  bf16 other[STAGES][OtherRows * STRIDE<OtherColumns>];
};

// Copies a tile to shared memory: from its first element on. Beyond the rows and columns that are there it is zero.
template <int Rows, int Columns>
__device__ __forceinline__ void copy_tile(bf16* to, const bf16* from, long long stride, long long rows, int columns) {
  constexpr int CHUNKS = Columns / 8;
  for (int i = threadIdx.x; i < Rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, column = i % CHUNKS * 8;
    const bool is_there = row < rows && column < columns;
    copy_async16(to + row * STRIDE<Columns> + column, is_there ? from + row * stride + column : from, is_there);
  }
}

template <int R, Factor F>
constexpr int FACTOR_ROWS = F == A ? R : DEPTH;
template <int R, Factor F>
constexpr int FACTOR_COLUMNS = F == A ? DEPTH : R;

// The part of a factor for DEPTH columns of the matrix, of which `columns` are there.
template <int R, Factor F>
__device__ __forceinline__ void copy_factor(bf16* to, const bf16* factor, int width, int first, int columns) {
  if (F == A) {
    copy_tile<R, DEPTH>(to, factor + first, width, R, columns);
  } else {
    copy_tile<DEPTH, R>(to, factor + size_t(first) * R, R, columns, R);
  }
}

// Copies and uses tiles in turn: copy(number, buffer) asks for one, use(number, buffer) finds it landed. The one barrier a tile says both
// that all threads' copies have landed, and that the buffer which is copied to next is read no more.
template <class Copy, class Use>
__device__ __forceinline__ void walk(int count, Copy copy, Use use) {
#pragma unroll
  for (int number = 0; number < STAGES - 1; number++) {
    if (number < count) copy(number, number);
    copy_async_commit();
  }
  for (int number = 0; number < count; number++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    const int next = number + STAGES - 1;
    if (next < count) copy(next, next % STAGES);
    copy_async_commit();
    use(number % STAGES, number);
  }
}

template <int R, Factor F>
__device__ __forceinline__ void down(bf16* h, float* parts, const bf16* matrix, const bf16* factor, const LowRank& a,
                                     int columns_a_part) {
  using Block = Memory<ROWS, DEPTH, FACTOR_ROWS<R, F>, FACTOR_COLUMNS<R, F>>;
  Block& block = shared<Block>();
  const long long first_token = blockIdx.x * (long long)ROWS;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  const int begin = blockIdx.y * columns_a_part, end = min(begin + columns_a_part, a.width);
  auto copy = [&](int number, int buffer) {
    const int first = begin + number * DEPTH;
    copy_tile<ROWS, DEPTH>(block.matrix[buffer], matrix + first_token * a.stride + first, a.stride,
                           a.tokens - first_token, end - first);
    copy_factor<R, F>(block.other[buffer], factor, a.width, first, end - first);
  };
  float sums[2][R / 8][4] = {};
  auto use = [&](int buffer, int) {
    const bf16* rows = block.matrix[buffer] + (warp_row + lane % 16) * STRIDE<DEPTH> + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
      uint32_t left[2][4], right[R / 8][2];
      load_matrix_x4(left[0], rows + step * 16);
      load_matrix_x4(left[1], rows + step * 16 + 16 * STRIDE<DEPTH>);
      if constexpr (F == A) {
        right_of_rows<DEPTH, R>(right, block.other[buffer], step);
      } else {
        right_of_columns<R>(right, block.other[buffer], step);
      }
      multiply_tile(sums, left, right);
    }
  };
  walk((end - begin + DEPTH - 1) / DEPTH, copy, use);

#pragma unroll
  for (int half = 0; half < 4; half++) {
    const long long token = first_token + warp_row + half / 2 * 16 + row_of(half % 2 * 2);
    if (token >= a.tokens) continue;
#pragma unroll
    for (int j = 0; j < R / 8; j++) {
      const float low = sums[half / 2][j][half % 2 * 2], high = sums[half / 2][j][half % 2 * 2 + 1];
      if (gridDim.y > 1) {
        float* to = parts + (blockIdx.y * a.tokens + token) * R + column_of(j, 0);
        *reinterpret_cast<float2*>(to) = make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(h + token * a.h_stride + column_of(j, 0)) = pack_bf16(a.scale * low, a.scale * high);
      }
    }
  }
}

// The parts of `down`: h = scale · Σ parts, in their order. A thread has 8 columns.
KERNEL __launch_bounds__(THREADS) low_rank_sum(bf16* h, const float* parts, LowRank a, int count, int rank) {
  const long long first = (blockIdx.x * (long long)THREADS + threadIdx.x) * 8, size = a.tokens * rank;
  if (first >= size) return;
  float sum[8] = {}, part[8];
  for (int number = 0; number < count; number++) {
    load8(part, parts + number * size + first);
#pragma unroll
    for (int k = 0; k < 8; k++) sum[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < 8; k++) sum[k] *= a.scale;
  store8(h + first / rank * a.h_stride + first % rank, sum);
}

template <int R, Factor F>
__device__ __forceinline__ void up(bf16* matrix, const bf16* h, const bf16* factor, const LowRank& a,
                                   int columns_a_part) {
  using Block = Memory<ROWS, DEPTH, FACTOR_ROWS<R, F>, FACTOR_COLUMNS<R, F>>;
  Block& block = shared<Block>();
  const long long first_token = blockIdx.x * (long long)ROWS, tokens = a.tokens - first_token;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  const int begin = blockIdx.y * columns_a_part, end = min(begin + columns_a_part, a.width);
  matrix += first_token * a.stride, h += first_token * a.h_stride;
  auto copy = [&](int number, int buffer) {
    const int first = begin + number * DEPTH;
    copy_tile<ROWS, DEPTH>(block.matrix[buffer], matrix + first, a.stride, tokens, end - first);
    copy_factor<R, F>(block.other[buffer], factor, a.width, first, end - first);
  };
  // The warp's rows of h stay in registers.
  uint32_t left[R / 16][2][4];
#pragma unroll
  for (int step = 0; step < R / 16; step++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = warp_row + i / 4 * 16 + lane / 4 + i % 2 * 8, column = step * 16 + lane % 4 * 2 + i / 2 % 2 * 8;
      left[step][i / 4][i % 4] =
          row < tokens ? *reinterpret_cast<const uint32_t*>(h + row * a.h_stride + column) : 0;
    }
  auto use = [&](int buffer, int number) {
    float sums[2][DEPTH / 8][4] = {};
#pragma unroll
    for (int step = 0; step < R / 16; step++) {
      uint32_t right[DEPTH / 8][2];
      if constexpr (F == A) {
        right_of_columns<DEPTH>(right, block.other[buffer], step);
      } else {
        right_of_rows<R, DEPTH>(right, block.other[buffer], step);
      }
      multiply_tile(sums, left[step], right);
    }
    // Added in shared memory, so that memory is read and written by whole rows of 128 bytes.
    bf16* rows = block.matrix[buffer] + warp_row * STRIDE<DEPTH>;
#pragma unroll
    for (int half = 0; half < 4; half++)
#pragma unroll
      for (int j = 0; j < DEPTH / 8; j++) {
        const float* sum = sums[half / 2][j] + half % 2 * 2;
        bf16* at = rows + (half / 2 * 16 + row_of(half % 2 * 2)) * STRIDE<DEPTH> + column_of(j, 0);
        const uint32_t pair = *reinterpret_cast<uint32_t*>(at);
        *reinterpret_cast<uint32_t*>(at) = pack_bf16(fmaf(a.scale, sum[0], __uint_as_float(pair << 16)),
                                                     fmaf(a.scale, sum[1], __uint_as_float(pair & 0xffff0000u)));
      }
    __syncwarp();
    const int first = begin + number * DEPTH;
#pragma unroll
    for (int i = lane; i < WARP_ROWS * DEPTH / 8; i += 32) {
      const int row = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
      if (warp_row + row < tokens && first + column < end) {
        *reinterpret_cast<uint4*>(matrix + (warp_row + row) * a.stride + first + column) =
            *reinterpret_cast<const uint4*>(rows + row * STRIDE<DEPTH> + column);
      }
    }
  };
  walk((end - begin + DEPTH - 1) / DEPTH, copy, use);
}

// Rows of the product are columns of the matrix. One part is added to the gradient; several are stored, for add_parts.
template <int R, Factor F>
__device__ __forceinline__ void gradient(float* d_factor, float* parts, const bf16* matrix, const bf16* h,
                                         const LowRank& a, int tokens_a_part) {
  using Block = Memory<DEPTH, ROWS, DEPTH, R>;
  Block& block = shared<Block>();
  const int first_column = blockIdx.x * ROWS;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  const long long begin = blockIdx.y * (long long)tokens_a_part, end = min(begin + tokens_a_part, a.tokens);
  auto copy = [&](int number, int buffer) {
    const long long first = begin + number * DEPTH;
    copy_tile<DEPTH, ROWS>(block.matrix[buffer], matrix + first * a.stride + first_column, a.stride, end - first,
                           a.width - first_column);
    copy_tile<DEPTH, R>(block.other[buffer], h + first * a.h_stride, a.h_stride, end - first, R);
  };
  float sums[2][R / 8][4] = {};
  auto use = [&](int buffer, int) {
    const bf16* columns =
        block.matrix[buffer] + (lane / 16 * 8 + lane % 8) * STRIDE<ROWS> + warp_row + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
      uint32_t left[2][4], right[R / 8][2];
      load_matrix_x4_transposed(left[0], columns + step * 16 * STRIDE<ROWS>);
      load_matrix_x4_transposed(left[1], columns + step * 16 * STRIDE<ROWS> + 16);
      right_of_columns<R>(right, block.other[buffer], step);
      multiply_tile(sums, left, right);
    }
  };
  walk(int((end - begin + DEPTH - 1) / DEPTH), copy, use);

  const bool adds = gridDim.y == 1;
  float* to = adds ? d_factor : parts + blockIdx.y * size_t(a.width) * R;
#pragma unroll
  for (int half = 0; half < 4; half++) {
    const int column = first_column + warp_row + half / 2 * 16 + row_of(half % 2 * 2);
    if (column >= a.width) continue;
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int rank = column_of(j, e);
        float* at = to + (F == A ? size_t(rank) * a.width + column : size_t(column) * R + rank);
        const float sum = a.scale * sums[half / 2][j][half % 2 * 2 + e];
        *at = adds ? *at + sum : sum;
      }
  }
}

#define LOW_RANK_OF_FACTOR(name, R, F)                                                                             \
  KERNEL __launch_bounds__(THREADS)                                                                                \
      low_rank_down_##name(bf16* h, float* parts, const bf16* matrix, const bf16* factor, LowRank sizes,           \
                           int columns_a_part) {                                                                   \
    down<R, F>(h, parts, matrix, factor, sizes, columns_a_part);                                                   \
  }                                                                                                                \
  KERNEL __launch_bounds__(THREADS)                                                                                \
      low_rank_up_##name(bf16* matrix, const bf16* h, const bf16* factor, LowRank sizes, int columns_a_part) {     \
    up<R, F>(matrix, h, factor, sizes, columns_a_part);                                                            \
  }                                                                                                                \
  KERNEL __launch_bounds__(THREADS)                                                                                \
      low_rank_gradient_##name(float* d_factor, float* parts, const bf16* matrix, const bf16* h, LowRank sizes,    \
                               int tokens_a_part) {                                                                \
    gradient<R, F>(d_factor, parts, matrix, h, sizes, tokens_a_part);                                              \
  }
#define LOW_RANK(R)                    \
  LOW_RANK_OF_FACTOR(a_##R, R, A)      \
  LOW_RANK_OF_FACTOR(b_##R, R, B)
LOW_RANK(16)
LOW_RANK(32)
LOW_RANK(48)
LOW_RANK(64)

}  // namespace

#define LOW_RANK_ENTRIES(R)    \
  ENTRY(low_rank_down_a_##R)   \
  ENTRY(low_rank_down_b_##R)   \
  ENTRY(low_rank_up_a_##R)     \
  ENTRY(low_rank_up_b_##R)     \
  ENTRY(low_rank_gradient_a_##R) \
  ENTRY(low_rank_gradient_b_##R)
LOW_RANK_ENTRIES(16)
LOW_RANK_ENTRIES(32)
LOW_RANK_ENTRIES(48)
LOW_RANK_ENTRIES(64)
ENTRY(low_rank_sum)
