// Attention and its gradients for heads of any size up to 512, without tensor cores: right before it is fast. Shapes, tiles and arguments
// are those of attention.cu and attention_backward.cu. A warp takes 16 queries, or keys, one after the other; lane l holds elements l,
// l + 32, … of a head.
#include "attention.cuh"

namespace {

constexpr int MOST_A_LANE = 16;

struct Vector {
  float values[MOST_A_LANE];
};

__device__ __forceinline__ Vector zeros() {
  Vector vector;
#pragma unroll
  for (int i = 0; i < MOST_A_LANE; i++) vector.values[i] = 0;
  return vector;
}

__device__ __forceinline__ Vector load_head(const bf16* from, int head_dim) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < MOST_A_LANE; i++) {
    const int element = threadIdx.x % 32 + 32 * i;
    vector.values[i] = element < head_dim ? to_float(from[element]) : 0.0f;
  }
  return vector;
}

__device__ __forceinline__ void store_head(bf16* to, const Vector& vector, float factor, int head_dim) {
#pragma unroll
  for (int i = 0; i < MOST_A_LANE; i++) {
    const int element = threadIdx.x % 32 + 32 * i;
    if (element < head_dim) to[element] = to_bf16(vector.values[i] * factor);
  }
}

__device__ __forceinline__ float dot(const Vector& a, const Vector& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < MOST_A_LANE; i++) sum += a.values[i] * b.values[i];
  return warp_sum(sum);
}

__device__ __forceinline__ void add(Vector& sum, float factor, const Vector& vector) {
#pragma unroll
  for (int i = 0; i < MOST_A_LANE; i++) sum.values[i] += factor * vector.values[i];
}

// A score, and the slope of its cap.
struct Score {
  float value, slope;
};
__device__ __forceinline__ Score score_of(const Attention& a, float product) {
  const float score = a.scale * product;
  if (!(a.cap > 0)) return {score, 1};
  const float bent = tanhf(score / a.cap);
  return {a.cap * bent, 1 - bent * bent};
}

// The queries of a tile that this warp takes, by their positions.
struct Span {
  int first, last;
};
__device__ __forceinline__ Span span_of(const Row& row, const Tile& tile) {
  const int first = tile.first + threadIdx.x / 32 * 16;
  return {row.prefix_length + first, row.prefix_length + min(first + 16, row.length)};
}

KERNEL __launch_bounds__(THREADS)
    attention_plain(bf16* y, float* log_sums, const bf16* q, const bf16* k, const bf16* v, Attention a, int head_dim) {
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int head = blockIdx.y, kv_head = head / a.group;
  const Span span = span_of(row, tile);
  for (int position = span.first; position < span.last; position++) {
    const long long token = token_at(row, position);
    const Vector query = load_head(q + token * a.q_stride + size_t(head) * head_dim, head_dim);
    Vector sum = zeros();
    float largest = -INFINITY, total = 0;
    for (int key = a.window ? max(0, position - a.window + 1) : 0; key <= position; key++) {
      const size_t at = token_at(row, key) * a.kv_stride + size_t(kv_head) * head_dim;
      const float score = score_of(a, dot(query, load_head(k + at, head_dim))).value;
      const float most = max(largest, score), shrink = expf(largest - most), power = expf(score - most);
#pragma unroll
      for (int i = 0; i < MOST_A_LANE; i++) sum.values[i] *= shrink;
      add(sum, power, load_head(v + at, head_dim));
      total = total * shrink + power;
      largest = most;
    }
    store_head(y + token * a.y_stride + size_t(head) * head_dim, sum, 1.0f / total, head_dim);
    if (threadIdx.x % 32 == 0) log_sums[head * a.tokens + token] = largest + logf(total);
  }
}

// One warp a head of a token.
KERNEL __launch_bounds__(THREADS)
    attention_plain_delta(float* delta, const bf16* dy, const bf16* y, long long y_stride, long long tokens, int heads,
                          int head_dim) {
  const long long number = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
  const long long token = number / heads;
  const int head = int(number % heads);
  if (token >= tokens) return;
  const size_t at = token * y_stride + size_t(head) * head_dim;
  const float sum = dot(load_head(dy + at, head_dim), load_head(y + at, head_dim));
  if (threadIdx.x % 32 == 0) delta[head * tokens + token] = sum;
}

KERNEL __launch_bounds__(THREADS)
    attention_plain_queries(bf16* dq, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,
                            const float* log_sums, const float* delta, Attention a, int head_dim) {
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int head = blockIdx.y, kv_head = head / a.group;
  const Span span = span_of(row, tile);
  for (int position = span.first; position < span.last; position++) {
    const long long token = token_at(row, position);
    const size_t own = size_t(head) * head_dim;
    const Vector query = load_head(q + token * a.q_stride + own, head_dim);
    const Vector gradient = load_head(dy + token * a.y_stride + own, head_dim);
    const float log_sum = log_sums[head * a.tokens + token], correction = delta[head * a.tokens + token];
    Vector sum = zeros();
    for (int key = a.window ? max(0, position - a.window + 1) : 0; key <= position; key++) {
      const size_t at = token_at(row, key) * a.kv_stride + size_t(kv_head) * head_dim;
      const Vector keys = load_head(k + at, head_dim);
      const Score score = score_of(a, dot(query, keys));
      const float by_share = dot(gradient, load_head(v + at, head_dim));
      add(sum, expf(score.value - log_sum) * score.slope * (by_share - correction), keys);
    }
    store_head(dq + token * a.q_stride + own, sum, a.scale, head_dim);
  }
}

KERNEL __launch_bounds__(THREADS)
    attention_plain_keys(bf16* dk, bf16* dv, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,
                         const float* log_sums, const float* delta, Attention a, int head_dim) {
  const Tile tile = a.tiles[blockIdx.x];
  const Row row = a.rows[tile.row];
  const int kv_head = blockIdx.y;
  const Span span = span_of(row, tile);
  for (int key = span.first; key < span.last; key++) {
    const size_t at = token_at(row, key) * a.kv_stride + size_t(kv_head) * head_dim;
    const Vector keys = load_head(k + at, head_dim), values = load_head(v + at, head_dim);
    Vector key_sum = zeros(), value_sum = zeros();
    // The row's own queries, then those of the rows that go on after it.
    for (int segment = -1; segment < row.followers; segment++) {
      const Row of = segment < 0 ? row : a.rows[row.first_follower + segment];
      const int end = of.prefix_length + of.length;
      const int last = a.window ? min(end, key + a.window) : end;
      for (int position = max(key, of.prefix_length); position < last; position++) {
        const long long token = token_at(of, position);
        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; head++) {
          const size_t own = size_t(head) * head_dim;
          const Vector query = load_head(q + token * a.q_stride + own, head_dim);
          const Vector gradient = load_head(dy + token * a.y_stride + own, head_dim);
          const Score score = score_of(a, dot(query, keys));
          const float power = expf(score.value - log_sums[head * a.tokens + token]);
          add(value_sum, power, gradient);
          add(key_sum, power * score.slope * (dot(gradient, values) - delta[head * a.tokens + token]), query);
        }
      }
    }
    store_head(dk + at, key_sum, a.scale, head_dim);
    store_head(dv + at, value_sum, 1, head_dim);
  }
}

}  // namespace

ENTRY(attention_plain)
ENTRY(attention_plain_delta)
ENTRY(attention_plain_queries)
ENTRY(attention_plain_keys)
