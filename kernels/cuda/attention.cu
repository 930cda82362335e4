// Causal attention over packed rows, forward: y = softmax(cap(scale · q·kᵀ)) · v (after FlashAttention-2; Dao, 2023).
// q, y: bf16 [tokens, heads, D]; k, v: bf16 [tokens, kv_heads, D], a token's heads side by side, tokens a stride apart. log_sums: f32
// [heads, tokens], of e^score. A row may go on after another one, its prefix, whose tokens it sees too; it may see no more than the last
// `window` tokens, itself included (0: all); scores may be capped by c · tanh(s / c) (0: they are not).
//
// A block takes one tile of the host's list: 64 queries of a row, of one head; a warp takes 16 of them. Keys come in tiles, of which the
// next is on its way while one is used. Rows in shared memory are 16 bytes apart from a multiple of 128, so that the eight rows of a
// matrix lie in eight bank groups. FLOPs: 4 · D for each pair of a query and a key that it sees; bytes: q and y once, k and v once a
// tile of queries, mostly from L2.
#include "attention.cuh"

namespace {

// Keys that are taken at a time.
template <int D>
constexpr int KEYS_OF = D > 128 ? 32 : 64;

template <int D>
struct Memory {
  static constexpr int KEYS = KEYS_OF<D>;
  bf16 q[QUERIES * STRIDE<D>];
  bf16 k[2][KEYS * STRIDE<D>], v[2][KEYS * STRIDE<D>];
};

template <int D>
__device__ __forceinline__ void forward(bf16* y, float* log_sums, const bf16* q, const bf16* k, const bf16* v,
                                        const Attention& a) {
  constexpr int KEYS = KEYS_OF<D>;
  Memory<D>& block = shared<Memory<D>>();
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int head = blockIdx.y, kv_head = head / a.group, warp = threadIdx.x / 32;
  q += size_t(head) * D, y += size_t(head) * D;
  k += size_t(kv_head) * D, v += size_t(kv_head) * D;

  // Positions: those of the prefix, then the row's own.
  const int first_query = row.prefix_length + tile.first;
  const int last_query = min(first_query + QUERIES, row.prefix_length + row.length) - 1;
  const int first_seen = a.window ? max(0, first_query - a.window + 1) : 0;
  const int first_tile = first_seen / KEYS, last_tile = last_query / KEYS;
  auto copy_keys = [&](int number, int buffer) {
    auto token_of = [&](int i) { return token_at(row, number * KEYS + i); };
    copy_rows<D, KEYS>(block.k[buffer], k, a.kv_stride, token_of);
    copy_rows<D, KEYS>(block.v[buffer], v, a.kv_stride, token_of);
  };
  auto query_of = [&](int i) { return token_at(row, first_query + i); };
  copy_rows<D, QUERIES>(block.q, q, a.q_stride, query_of);
  copy_keys(first_tile, 0);
  copy_async_commit();

  float sums[1][D / 8][4] = {};
  // Of a lane's two queries: the largest score so far, and the sum of powers.
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  const float factor = a.cap > 0 ? LOG2_E : a.scale * LOG2_E;
  for (int number = first_tile; number <= last_tile; number++) {
    const int buffer = (number - first_tile) % 2;
    if (number < last_tile) copy_keys(number + 1, buffer ^ 1);
    // The last group is empty: no copy is on its way when the loop ends.
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    float scores[1][KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t left[1][4], right[KEYS / 8][2];
      left_fragment<D>(left, block.q + warp * 16 * STRIDE<D>, step);
      right_of_rows<D, KEYS>(right, block.k[buffer], step);
      multiply_tile(scores, left, right);
    }
    const int first_key = number * KEYS;
    const bool is_cut = first_key + KEYS - 1 > first_query || (a.window && first_key < last_query - a.window + 1);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& score = scores[0][j][e];
        if (a.cap > 0) score = a.cap * tanhf(a.scale * score / a.cap);
        if (is_cut && !is_seen(a, first_query + warp * 16 + row_of(e), first_key + column_of(j, e))) score = -INFINITY;
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
    accumulate<D, KEYS>(sums, scores, block.v[buffer]);
    // The buffer is written again behind this.
    __syncthreads();
  }
  float inverses[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = total[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    inverses[half] = 1.0f / sum;
    const long long token = query_of(warp * 16 + row_of(2 * half));
    if (token >= 0 && threadIdx.x % 4 == 0) {
      log_sums[head * a.tokens + token] = largest[half] * (factor / LOG2_E) + logf(sum);
    }
  }
  write_rows<D>(y, a.y_stride, sums, inverses, [&](int i) { return query_of(warp * 16 + i); });
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
