// Cross-entropy over a chunk of tokens: loss = ln Σⱼ exp(l[j]) − l[target], l = cap · tanh(logit / cap) where logits are capped.
// The gradient by the logits, times `scale`, takes their place: scale · (softmax − onehot) · (1 − (l/cap)²).
// logits: bf16 or f32 [tokens, stride], of which `vocabulary` count; targets: i32 [tokens], −1 for a token without one, whose loss and
// gradient are 0. losses: f32 [tokens]. One block a token. Bytes: 3 times the logits' (twice read, of which once from L2, once written).
#include "block.cuh"

namespace {

constexpr int THREADS = 512;

struct Parts {
  float parts[THREADS / 32];
};

__device__ __forceinline__ float capped(float logit, float cap) { return cap > 0 ? cap * tanhf(logit / cap) : logit; }
__device__ __forceinline__ void store1(float* to, float value) { *to = value; }
__device__ __forceinline__ void store1(bf16* to, float value) { *to = to_bf16(value); }

template <class T>
__device__ __forceinline__ void losses_and_gradient(T* logits, float* losses, const int* targets, int vocabulary,
                                                    long long stride, float scale, float cap, bool wants_gradient) {
  Parts& block = shared<Parts>();
  T* row = logits + blockIdx.x * stride;
  const int target = targets[blockIdx.x];
  if (target < 0) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    if (wants_gradient)
      for (int i = threadIdx.x; i < vocabulary; i += THREADS) store1(row + i, 0.0f);
    return;
  }
  // A thread keeps a maximum and a sum of its own; they are brought to the block's maximum afterwards.
  float most = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
    const float logit = capped(load1(row + i), cap), above = max(most, logit);
    sum = sum * expf(most - above) + expf(logit - above);
    most = above;
  }
  const float largest = block_max<THREADS>(most, block.parts);
  // A thread without a word has no maximum: it adds 0 · e^−∞.
  sum = block_sum<THREADS>(sum * expf(most - largest), block.parts);
  if (threadIdx.x == 0) losses[blockIdx.x] = largest + logf(sum) - capped(load1(row + target), cap);
  if (!wants_gradient) return;
  // The target's logit has been read.
  __syncthreads();
  const float inverse = 1.0f / sum;
  for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
    const float logit = capped(load1(row + i), cap);
    const float slope = cap > 0 ? 1.0f - (logit / cap) * (logit / cap) : 1.0f;
    const float share = expf(logit - largest) * inverse - (i == target ? 1.0f : 0.0f);
    store1(row + i, scale * share * slope);
  }
}

KERNEL __launch_bounds__(THREADS)
    cross_entropy_f32(float* logits, float* losses, const int* targets, int vocabulary, long long stride, float scale,
                      float cap, int wants_gradient) {
  losses_and_gradient(logits, losses, targets, vocabulary, stride, scale, cap, wants_gradient != 0);
}
KERNEL __launch_bounds__(THREADS)
    cross_entropy_bf16(bf16* logits, float* losses, const int* targets, int vocabulary, long long stride, float scale,
                       float cap, int wants_gradient) {
  losses_and_gradient(logits, losses, targets, vocabulary, stride, scale, cap, wants_gradient != 0);
}

}  // namespace

ENTRY(cross_entropy_f32)
ENTRY(cross_entropy_bf16)
