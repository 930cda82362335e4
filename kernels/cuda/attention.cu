// Causal attention over packed rows, forward: y = softmax(cap(scale · q·kᵀ)) · v (after FlashAttention-2; Dao, 2023).
// q, y: bf16 [tokens, heads, D]; k, v: bf16 [tokens, kv_heads, D], a token's heads side by side, tokens a stride apart. log_sums: f32
// [heads, tokens], of e^score. A row may go on after another one, its prefix, whose tokens it sees too; it may see no more than the last
// `window` tokens, itself included (0: all); scores may be capped by c · tanh(s / c) (0: they are not).
//
// A block takes one tile of the host's list: 64 queries of a row, of one head; a warp takes 16 of them. Keys come in tiles, of which the
// next is on its way while one is used. Rows in shared memory are 16 bytes apart from a multiple of 128, so that the eight rows of a
// matrix lie in eight bank groups. FLOPs: 4 · D for each pair of a query and a key that it sees; bytes: q and y once, k and v once a
// tile of queries, mostly from L2.
#include "block.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int QUERIES = 16 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f;

// Where a row's tokens lie; prefix_length is 0 without a prefix.
struct Row {
  int start, length, prefix_start, prefix_length;
};

// 64 queries of a row, from its own token `first` on.
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

// Keys that are taken at a time.
template <int D>
constexpr int KEYS_OF = D > 128 ? 32 : 64;

template <int D>
struct Memory {
  static constexpr int KEYS = KEYS_OF<D>, STRIDE = D + 8;
  bf16 q[QUERIES * STRIDE];
  bf16 k[2][KEYS * STRIDE], v[2][KEYS * STRIDE];
};

// Copies `Rows` rows of one head to shared memory: token_of(i) tells where row i lies; below 0 it is zero.
template <int D, int Rows, class TokenOf>
__device__ __forceinline__ void copy_rows(bf16* to, const bf16* from, long long stride, TokenOf token_of) {
  constexpr int CHUNKS = D / 8;
  for (int i = threadIdx.x; i < Rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const long long token = token_of(row);
    copy_async16(to + row * Memory<D>::STRIDE + chunk * 8, from + max(token, 0ll) * stride + chunk * 8, token >= 0);
  }
}

template <int D>
__device__ __forceinline__ void forward(bf16* y, float* log_sums, const bf16* q, const bf16* k, const bf16* v,
                                        const Attention& a) {
  constexpr int KEYS = KEYS_OF<D>, STRIDE = Memory<D>::STRIDE;
  Memory<D>& block = shared<Memory<D>>();
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int head = blockIdx.y, kv_head = head / a.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  q += size_t(head) * D, y += size_t(head) * D;
  k += size_t(kv_head) * D, v += size_t(kv_head) * D;

  // Positions: those of the prefix, then the row's own.
  const int first_query = row.prefix_length + tile.first, keys = row.prefix_length + row.length;
  const int last_query = min(first_query + QUERIES, keys) - 1;
  const int first_seen = a.window ? max(0, first_query - a.window + 1) : 0;
  const int first_tile = first_seen / KEYS, last_tile = last_query / KEYS;

  auto key_tile = [&](int number, int buffer) {
    auto token_of = [&](int i) -> long long {
      const int position = number * KEYS + i;
      if (position >= keys) return -1;
      return position < row.prefix_length ? row.prefix_start + position
                                          : row.start + (position - row.prefix_length);
    };
    copy_rows<D, KEYS>(block.k[buffer], k, a.kv_stride, token_of);
    copy_rows<D, KEYS>(block.v[buffer], v, a.kv_stride, token_of);
  };
  copy_rows<D, QUERIES>(block.q, q, a.q_stride, [&](int i) -> long long {
    return tile.first + i < row.length ? row.start + tile.first + i : -1;
  });
  key_tile(first_tile, 0);
  copy_async_commit();

  // Of a warp's 16 queries, a lane has two: lane / 4, and 8 further on.
  float sums[1][D / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  // Scores as powers of 2.
  const float factor = a.cap > 0 ? LOG2_E : a.scale * LOG2_E;
  for (int number = first_tile; number <= last_tile; number++) {
    const int buffer = (number - first_tile) % 2;
    if (number < last_tile) key_tile(number + 1, buffer ^ 1);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    float scores[1][KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t left[1][4], right[KEYS / 8][2];
      load_matrix_x4(left[0], block.q + (warp * 16 + lane % 16) * STRIDE + step * 16 + lane / 16 * 8);
#pragma unroll
      for (int pair = 0; pair < KEYS / 16; pair++) {
        uint32_t both[4];
        const int key = pair * 16 + lane % 8 + lane / 16 * 8;
        load_matrix_x4(both, block.k[buffer] + key * STRIDE + step * 16 + lane / 8 % 2 * 8);
        right[2 * pair][0] = both[0], right[2 * pair][1] = both[1];
        right[2 * pair + 1][0] = both[2], right[2 * pair + 1][1] = both[3];
      }
      multiply_tile(scores, left, right);
    }
    if (a.cap > 0) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[0][j][e] = a.cap * tanhf(a.scale * scores[0][j][e] / a.cap);
    }
    const int first_key = number * KEYS;
    if (first_key + KEYS - 1 > first_query || (a.window && first_key < last_query - a.window + 1)) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int key = first_key + j * 8 + lane % 4 * 2 + e % 2;
          const int query = first_query + warp * 16 + lane / 4 + e / 2 * 8;
          if (key > query || (a.window && key <= query - a.window)) scores[0][j][e] = -INFINITY;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) most = max(most, max(scores[0][j][2 * half], scores[0][j][2 * half + 1]));
      most = max(most, __shfl_xor_sync(~0u, most, 1));
      most = max(most, __shfl_xor_sync(~0u, most, 2));
      // A query that has seen no key yet has no maximum.
      const float base = most == -INFINITY ? 0.0f : most * factor;
      const float shrink = exp2_approx(fmaf(largest[half], factor, -base));
      largest[half] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          scores[0][j][e] = exp2_approx(fmaf(scores[0][j][e], factor, -base));
          sum += scores[0][j][e];
        }
      total[half] = total[half] * shrink + sum;
#pragma unroll
      for (int j = 0; j < D / 8; j++) sums[0][j][2 * half] *= shrink, sums[0][j][2 * half + 1] *= shrink;
    }
    // The accumulators of 16 keys are the left fragment of their product with the values.
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      const auto& low = scores[0][2 * step];
      const auto& high = scores[0][2 * step + 1];
      const uint32_t left[1][4] = {{pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                                    pack_bf16(high[2], high[3])}};
      uint32_t right[D / 8][2];
#pragma unroll
      for (int pair = 0; pair < D / 16; pair++) {
        uint32_t both[4];
        load_matrix_x4_transposed(
            both, block.v[buffer] + (step * 16 + lane % 16) * STRIDE + pair * 16 + lane / 16 * 8);
        right[2 * pair][0] = both[0], right[2 * pair][1] = both[1];
        right[2 * pair + 1][0] = both[2], right[2 * pair + 1][1] = both[3];
      }
      multiply_tile(sums, left, right);
    }
    // The buffer is written again behind this.
    __syncthreads();
  }
  copy_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = total[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int own = tile.first + warp * 16 + lane / 4 + half * 8;
    if (own >= row.length) continue;
    const long long token = row.start + own;
    const float inverse = 1.0f / sum;
    bf16* to = y + token * a.y_stride + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      *reinterpret_cast<uint32_t*>(to + j * 8) =
          pack_bf16(sums[0][j][2 * half] * inverse, sums[0][j][2 * half + 1] * inverse);
    }
    if (lane % 4 == 0) log_sums[head * a.tokens + token] = largest[half] * (factor / LOG2_E) + logf(sum);
  }
}

#define ATTENTION(D)                                                                                               \
  KERNEL __launch_bounds__(THREADS) attention_##D(bf16* y, float* log_sums, const bf16* q, const bf16* k,          \
                                                  const bf16* v, Attention attention) {                            \
    forward<D>(y, log_sums, q, k, v, attention);                                                                   \
  }
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
ATTENTION(256)

}  // namespace

ENTRY(attention_64)
ENTRY(attention_80)
ENTRY(attention_96)
ENTRY(attention_128)
ENTRY(attention_256)
