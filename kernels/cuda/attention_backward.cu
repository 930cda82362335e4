// The gradients of attention (after FlashAttention-2; Dao, 2023), in two passes without atomics: one over tiles of queries for dq, one
// over tiles of keys for dk and dv, so that the same input gives the same bits. Both compute the scores again from log_sums.
//
// dy: bf16 [tokens, heads, D], as y lies. delta: f32 [heads, tokens], Σ dy · y of each query. dq lies as q does; dk and dv as k and v do.
// With p = e^(score − log_sum) and ds = p · (dy·vᵀ − delta) · slope of the cap: dq = scale · ds·k, dk = scale · dsᵀ·q, dv = pᵀ·dy.
// FLOPs: 6 · D for a pair of a query and a key in the first pass, 8 · D in the second (10 · D where a head of 256 takes it twice).
#include "attention.cuh"

namespace {

// One warp a head of a token.
template <int D>
__device__ __forceinline__ void deltas(float* delta, const bf16* dy, const bf16* y, long long y_stride,
                                       long long tokens, int heads) {
  const long long number = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
  const long long token = number / heads;
  const int head = int(number % heads), lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const size_t at = token * y_stride + size_t(head) * D;
  float sum = 0;
  for (int i = lane; i < D; i += 32) sum += to_float(dy[at + i]) * to_float(y[at + i]);
  sum = warp_sum(sum);
  if (lane == 0) delta[head * tokens + token] = sum;
}

// A score's power, e^(score − log_sum), and the slope of its cap, from the product of query and key.
struct Power {
  float value, slope;
};
__device__ __forceinline__ Power power_of(const Attention& a, float product, float log_sum) {
  float score = a.scale * product, slope = 1;
  if (a.cap > 0) {
    const float bent = tanhf(score / a.cap);
    score = a.cap * bent;
    slope = 1 - bent * bent;
  }
  return {exp2_approx((score - log_sum) * LOG2_E), slope};
}

// Keys that the first pass takes at a time.
template <int D>
constexpr int KEYS_OF = D > 128 ? 16 : D > 96 ? 32 : 64;

template <int D>
struct QueryMemory {
  static constexpr int KEYS = KEYS_OF<D>;
  bf16 q[QUERIES * STRIDE<D>], dy[QUERIES * STRIDE<D>];
  bf16 k[2][KEYS * STRIDE<D>], v[2][KEYS * STRIDE<D>];
};

template <int D>
__device__ __forceinline__ void query_pass(bf16* dq, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,
                                           const float* log_sums, const float* delta, const Attention& a) {
  constexpr int KEYS = KEYS_OF<D>;
  QueryMemory<D>& block = shared<QueryMemory<D>>();
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int head = blockIdx.y, kv_head = head / a.group, warp = threadIdx.x / 32;
  q += size_t(head) * D, dq += size_t(head) * D, dy += size_t(head) * D;
  k += size_t(kv_head) * D, v += size_t(kv_head) * D;

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
  copy_rows<D, QUERIES>(block.dy, dy, a.y_stride, query_of);
  copy_keys(first_tile, 0);
  copy_async_commit();

  // Of a lane's two queries.
  float log_sum[2], correction[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const long long token = query_of(warp * 16 + row_of(2 * half));
    log_sum[half] = token < 0 ? 0.0f : log_sums[head * a.tokens + token];
    correction[half] = token < 0 ? 0.0f : delta[head * a.tokens + token];
  }
  float sums[1][D / 8][4] = {};
  for (int number = first_tile; number <= last_tile; number++) {
    const int buffer = (number - first_tile) % 2;
    if (number < last_tile) copy_keys(number + 1, buffer ^ 1);
    // The last group is empty: no copy is on its way when the loop ends.
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    float scores[1][KEYS / 8][4] = {}, gradients[1][KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t left[1][4], right[KEYS / 8][2];
      left_fragment<D>(left, block.q + warp * 16 * STRIDE<D>, step);
      right_of_rows<D, KEYS>(right, block.k[buffer], step);
      multiply_tile(scores, left, right);
      left_fragment<D>(left, block.dy + warp * 16 * STRIDE<D>, step);
      right_of_rows<D, KEYS>(right, block.v[buffer], step);
      multiply_tile(gradients, left, right);
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int query = first_query + warp * 16 + row_of(e), key = number * KEYS + column_of(j, e);
        const Power power = power_of(a, scores[0][j][e], log_sum[e / 2]);
        float& gradient = gradients[0][j][e];
        gradient = is_seen(a, query, key) ? power.value * power.slope * (gradient - correction[e / 2]) : 0.0f;
      }
    accumulate<D, KEYS>(sums, gradients, block.k[buffer]);
    // The buffer is written again behind this.
    __syncthreads();
  }
  const float factors[2] = {a.scale, a.scale};
  write_rows<D>(dq, a.q_stride, sums, factors, [&](int i) { return query_of(warp * 16 + i); });
}

// Queries that the second pass takes at a time, against 64 keys.
constexpr int KEYS = 64;
template <int D>
constexpr int QUERIES_OF = D > 128 ? 16 : D > 96 ? 32 : 64;

template <int D>
struct KeyMemory {
  static constexpr int COUNT = QUERIES_OF<D>;
  bf16 k[KEYS * STRIDE<D>], v[KEYS * STRIDE<D>];
  bf16 q[2][COUNT * STRIDE<D>], dy[2][COUNT * STRIDE<D>];

  // A query's log-sum and delta lie in the 16 bytes behind its row: a head of 256 leaves no other room on a card of 99 KiB.
  __device__ __forceinline__ float2* numbers(int buffer, int query) {
    return reinterpret_cast<float2*>(q[buffer] + query * STRIDE<D> + D);
  }
};

// The queries that see a tile of keys: those of the row itself, then those of the rows that go on after it; of each tile of them, every
// head of the group.
struct Walk {
  int segment, tile, head;  // segment −1 is the row itself
};

template <int D>
struct Walker {
  const Attention& a;
  const Row& row;
  int first_key, last_key;  // positions

  // The row of a segment, and its tiles of queries that see a key.
  __device__ __forceinline__ Row row_of_segment(int segment) const {
    return segment < 0 ? row : a.rows[row.first_follower + segment];
  }
  __device__ __forceinline__ int first_tile(const Row& of) const {
    return max(0, first_key - of.prefix_length) / QUERIES_OF<D>;
  }
  __device__ __forceinline__ int end_tile(const Row& of) const {
    const int last = a.window ? min(of.length, last_key + a.window - of.prefix_length) : of.length;
    return (last + QUERIES_OF<D> - 1) / QUERIES_OF<D>;
  }
  __device__ __forceinline__ bool is_over(const Walk& walk) const { return walk.segment >= row.followers; }

  // The first place from the beginning of this segment on.
  __device__ __forceinline__ Walk from(int segment) const {
    for (; segment < row.followers; segment++) {
      const Row of = row_of_segment(segment);
      if (first_tile(of) < end_tile(of)) return {segment, first_tile(of), 0};
    }
    return {segment, 0, 0};
  }
  __device__ __forceinline__ Walk next(Walk walk) const {
    if (++walk.head < a.group) return walk;
    walk.head = 0;
    const Row of = row_of_segment(walk.segment);
    return ++walk.tile < end_tile(of) ? walk : from(walk.segment + 1);
  }
};

enum Part { BOTH, KEYS_ALONE, VALUES_ALONE };

template <int D, int Which>
__device__ __forceinline__ void key_pass(bf16* dk, bf16* dv, const bf16* dy, const bf16* q, const bf16* k,
                                         const bf16* v, const float* log_sums, const float* delta,
                                         const Attention& a) {
  constexpr int COUNT = QUERIES_OF<D>;
  KeyMemory<D>& block = shared<KeyMemory<D>>();
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int kv_head = blockIdx.y, warp = threadIdx.x / 32;
  k += size_t(kv_head) * D, v += size_t(kv_head) * D, dk += size_t(kv_head) * D, dv += size_t(kv_head) * D;

  const int first_key = row.prefix_length + tile.first;
  const int last_key = min(first_key + KEYS, row.prefix_length + row.length) - 1;
  const Walker<D> walker{a, row, first_key, last_key};
  auto key_of = [&](int i) { return token_at(row, first_key + i); };
  auto copy_queries = [&](const Walk& walk, int buffer) {
    const Row of = walker.row_of_segment(walk.segment);
    const int head = kv_head * a.group + walk.head, first = of.prefix_length + walk.tile * COUNT;
    auto token_of = [&](int i) { return token_at(of, first + i); };
    copy_rows<D, COUNT>(block.q[buffer], q + size_t(head) * D, a.q_stride, token_of);
    copy_rows<D, COUNT>(block.dy[buffer], dy + size_t(head) * D, a.y_stride, token_of);
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
      const long long token = token_of(i);
      // A query that is not there has no power.
      *block.numbers(buffer, i) = token < 0 ? make_float2(INFINITY, 0.0f)
                                            : make_float2(log_sums[head * a.tokens + token],
                                                          delta[head * a.tokens + token]);
    }
  };
  Walk walk = walker.from(-1);
  copy_rows<D, KEYS>(block.k, k, a.kv_stride, key_of);
  copy_rows<D, KEYS>(block.v, v, a.kv_stride, key_of);
  copy_queries(walk, 0);
  copy_async_commit();

  float key_sums[1][D / 8][4] = {}, value_sums[1][D / 8][4] = {};
  for (int buffer = 0; !walker.is_over(walk); buffer ^= 1) {
    const Walk next = walker.next(walk);
    if (!walker.is_over(next)) copy_queries(next, buffer ^ 1);
    // The last group is empty: no copy is on its way when the loop ends.
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    // Keys are rows here, and queries columns.
    float powers[1][COUNT / 8][4] = {}, gradients[1][COUNT / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t left[1][4], right[COUNT / 8][2];
      left_fragment<D>(left, block.k + warp * 16 * STRIDE<D>, step);
      right_of_rows<D, COUNT>(right, block.q[buffer], step);
      multiply_tile(powers, left, right);
      if (Which == VALUES_ALONE) continue;
      left_fragment<D>(left, block.v + warp * 16 * STRIDE<D>, step);
      right_of_rows<D, COUNT>(right, block.dy[buffer], step);
      multiply_tile(gradients, left, right);
    }
    const int first_query = walker.row_of_segment(walk.segment).prefix_length + walk.tile * COUNT;
#pragma unroll
    for (int j = 0; j < COUNT / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int column = column_of(j, e), key = first_key + warp * 16 + row_of(e);
        const float2 numbers = *block.numbers(buffer, column);
        Power power = power_of(a, powers[0][j][e], numbers.x);
        if (!is_seen(a, first_query + column, key)) power.value = 0;
        powers[0][j][e] = power.value;
        gradients[0][j][e] = power.value * power.slope * (gradients[0][j][e] - numbers.y);
      }
    if (Which != KEYS_ALONE) accumulate<D, COUNT>(value_sums, powers, block.dy[buffer]);
    if (Which != VALUES_ALONE) accumulate<D, COUNT>(key_sums, gradients, block.q[buffer]);
    walk = next;
    // The buffer is written again behind this.
    __syncthreads();
  }
  const float scales[2] = {a.scale, a.scale}, ones[2] = {1, 1};
  auto own = [&](int i) { return key_of(warp * 16 + i); };
  if (Which != VALUES_ALONE) write_rows<D>(dk, a.kv_stride, key_sums, scales, own);
  if (Which != KEYS_ALONE) write_rows<D>(dv, a.kv_stride, value_sums, ones, own);
}

#define DELTA_AND_QUERIES(D)                                                                                        \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      attention_delta_##D(float* delta, const bf16* dy, const bf16* y, long long y_stride, long long tokens,        \
                          int heads) {                                                                              \
    deltas<D>(delta, dy, y, y_stride, tokens, heads);                                                               \
  }                                                                                                                 \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      attention_queries_##D(bf16* dq, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,                  \
                            const float* log_sums, const float* delta, Attention attention) {                       \
    query_pass<D>(dq, dy, q, k, v, log_sums, delta, attention);                                                     \
  }
#define KEYS_AND_VALUES(name, D, part)                                                                              \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      name(bf16* dk, bf16* dv, const bf16* dy, const bf16* q, const bf16* k, const bf16* v, const float* log_sums,  \
           const float* delta, Attention attention) {                                                               \
    key_pass<D, part>(dk, dv, dy, q, k, v, log_sums, delta, attention);                                             \
  }
DELTA_AND_QUERIES(64)
DELTA_AND_QUERIES(80)
DELTA_AND_QUERIES(96)
DELTA_AND_QUERIES(128)
DELTA_AND_QUERIES(256)
KEYS_AND_VALUES(attention_keys_64, 64, BOTH)
KEYS_AND_VALUES(attention_keys_80, 80, BOTH)
KEYS_AND_VALUES(attention_keys_96, 96, BOTH)
KEYS_AND_VALUES(attention_keys_128, 128, BOTH)
// Registers do not hold both sums of a head of 256.
KEYS_AND_VALUES(attention_keys_256, 256, KEYS_ALONE)
KEYS_AND_VALUES(attention_values_256, 256, VALUES_ALONE)

}  // namespace

ENTRY(attention_delta_64)
ENTRY(attention_delta_80)
ENTRY(attention_delta_96)
ENTRY(attention_delta_128)
ENTRY(attention_delta_256)
ENTRY(attention_queries_64)
ENTRY(attention_queries_80)
ENTRY(attention_queries_96)
ENTRY(attention_queries_128)
ENTRY(attention_queries_256)
ENTRY(attention_keys_64)
ENTRY(attention_keys_80)
ENTRY(attention_keys_96)
ENTRY(attention_keys_128)
ENTRY(attention_keys_256)
ENTRY(attention_values_256)
