// Rotary position embedding (Su et al., 2021) in transformers' layout, after the RMSNorm of queries and keys where a model has one.
// Element i of a head's first half and element i of its second half are a point, which position p turns by p · frequency[i]; where only
// a part of a head is rotated, these are the halves of that part.
// x, y: bf16 [tokens, heads, head_dim], a token's heads side by side, tokens `stride` elements apart (q and k may be columns of one
// product). cos, sin: f32 [tokens, half], stretched already. weight: f32 [head_dim] or absent. scales: f32 [tokens, heads].
// One warp a head of a token. Bytes: 4 an element forward, 6 backward.
#include "block.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int MOST_A_LANE = 16;  // head_dim is at most 512

struct Rope {
  const float *cos, *sin;
  int heads, head_dim, half;
};

// The head that this warp works on: false if there is none.
__device__ __forceinline__ bool find_head(const Rope& rope, long long tokens, long long& token, int& head) {
  const long long number = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
  token = number / rope.heads;
  head = int(number % rope.heads);
  return token < tokens;
}

// Turns the head's values, which lane l holds as numbers l, l + 32, …: each fetches its partner's by way of shared memory.
__device__ __forceinline__ void rotate(float (&values)[MOST_A_LANE], float* head, const Rope& rope, long long token,
                                       float direction) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    if (i < rope.head_dim) head[i] = values[k];
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    if (i >= 2 * rope.half) continue;
    const bool is_first = i < rope.half;
    const long long angle = token * rope.half + (is_first ? i : i - rope.half);
    const float partner = head[is_first ? i + rope.half : i - rope.half];
    const float sine = (is_first ? -direction : direction) * rope.sin[angle];
    values[k] = values[k] * rope.cos[angle] + partner * sine;
  }
}

// y = rotation of x, normalised first where there is a weight. y may lie where x does.
KERNEL __launch_bounds__(WARPS * 32)
    norm_rope(bf16* y, float* scales, const bf16* x, const float* weight, Rope rope, long long tokens,
              long long y_stride, long long x_stride, float eps, float offset) {
  float* head_values = &shared<float>() + threadIdx.x / 32 * rope.head_dim;
  long long token;
  int head;
  if (!find_head(rope, tokens, token, head)) return;
  const int lane = threadIdx.x % 32;
  const bf16* from = x + token * x_stride + size_t(head) * rope.head_dim;
  float values[MOST_A_LANE], squares = 0;
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    values[k] = i < rope.head_dim ? to_float(from[i]) : 0.0f;
    squares += values[k] * values[k];
  }
  if (weight) {
    const float scale = 1.0f / sqrtf(warp_sum(squares) / float(rope.head_dim) + eps);
    if (lane == 0) scales[token * rope.heads + head] = scale;
#pragma unroll
    for (int k = 0; k < MOST_A_LANE; k++) {
      const int i = lane + 32 * k;
      if (i < rope.head_dim) values[k] = values[k] * scale * (offset + weight[i]);
    }
  }
  rotate(values, head_values, rope, token, 1.0f);
  bf16* to = y + token * y_stride + size_t(head) * rope.head_dim;
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    if (i < rope.head_dim) to[i] = to_bf16(values[k]);
  }
}

// dx from dy, by way of the opposite rotation. dx may lie where dy does.
KERNEL __launch_bounds__(WARPS * 32)
    norm_rope_backward(bf16* dx, const bf16* dy, const bf16* x, const float* weight, const float* scales, Rope rope,
                       long long tokens, long long dx_stride, long long dy_stride, long long x_stride, float offset) {
  float* head_values = &shared<float>() + threadIdx.x / 32 * rope.head_dim;
  long long token;
  int head;
  if (!find_head(rope, tokens, token, head)) return;
  const int lane = threadIdx.x % 32;
  const bf16* from = dy + token * dy_stride + size_t(head) * rope.head_dim;
  float values[MOST_A_LANE];
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    values[k] = i < rope.head_dim ? to_float(from[i]) : 0.0f;
  }
  rotate(values, head_values, rope, token, -1.0f);
  if (weight) {
    const bf16* inputs = x + token * x_stride + size_t(head) * rope.head_dim;
    const float scale = scales[token * rope.heads + head];
    float correlation = 0;
#pragma unroll
    for (int k = 0; k < MOST_A_LANE; k++) {
      const int i = lane + 32 * k;
      if (i >= rope.head_dim) continue;
      values[k] *= offset + weight[i];
      correlation += to_float(inputs[i]) * values[k];
    }
    const float pull = warp_sum(correlation) * scale * scale / float(rope.head_dim);
#pragma unroll
    for (int k = 0; k < MOST_A_LANE; k++) {
      const int i = lane + 32 * k;
      if (i < rope.head_dim) values[k] = scale * (values[k] - to_float(inputs[i]) * pull);
    }
  }
  bf16* to = dx + token * dx_stride + size_t(head) * rope.head_dim;
#pragma unroll
  for (int k = 0; k < MOST_A_LANE; k++) {
    const int i = lane + 32 * k;
    if (i < rope.head_dim) to[i] = to_bf16(values[k]);
  }
}

}  // namespace

ENTRY(norm_rope)
ENTRY(norm_rope_backward)
