// Dropout and NEFTune (Jain et al., 2023). Each element's random bits follow from a key and its index, so that the backward pass finds
// the same, and any other device. x, y: bf16. Bytes: 4 an element.
#include "block.cuh"
#include "philox.cuh"

namespace {

constexpr int THREADS = 256;

// y = x · scale where the element's 32 bits are at or above the threshold, p · 2³², else 0. A thread takes 8; count is a multiple of 8.
KERNEL __launch_bounds__(THREADS)
    drop_out(bf16* y, const bf16* x, long long count, unsigned threshold, float scale, unsigned long long key) {
  const long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * 8;
  if (i >= count) return;
  float values[8];
  load8(values, x + i);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Philox bits = philox(uint64_t(i) / 4 + half, key);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float& value = values[4 * half + k];
      value = bits.words[k] >= threshold ? value * scale : 0.0f;
    }
  }
  store8(y + i, values);
}

// x += uniform noise within ± alpha / √(tokens of the row · width). One block a token; lengths: tokens of the token's row [tokens].
KERNEL __launch_bounds__(THREADS)
    neftune(bf16* x, const int* lengths, int width, float alpha, unsigned long long key) {
  const size_t token = blockIdx.x;
  const float bound = alpha / sqrtf(float(size_t(lengths[token]) * width));
  const uint64_t first = token * ((width + 3) / 4);
  for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) {
    const Philox bits = philox(first + i / 4, key);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (i + k >= width) break;
      bf16& value = x[token * width + i + k];
      value = to_bf16(to_float(value) + (2.0f * unit(bits.words[k]) - 1.0f) * bound);
    }
  }
}

}  // namespace

ENTRY(drop_out)
ENTRY(neftune)
