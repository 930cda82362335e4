// RMSNorm (Zhang and Sennrich, 2019), with the residual stream that it follows: y = x · s · (offset + w), s = 1/√(mean(x²) + eps).
// x, y, residual, their gradients: bf16 [rows, width]; w: f32 [width]; s: f32 [rows]. width is a multiple of 8.
// One block a row. Bytes: forward 4 · rows · width (8 with a residual), backward 6 (8); FLOPs: 4 and 10 an element.
#include "block.cuh"

namespace {

constexpr int THREADS = 256;

struct Sums {
  float parts[THREADS / 32];
};

// With a residual, x + residual becomes x: it is stored in `sum`, rounded, and then normalised.
KERNEL __launch_bounds__(THREADS)
    rms_norm(bf16* y, float* scales, bf16* sum, const bf16* x, const bf16* residual, const float* weight, int width,
             float eps, float offset) {
  Sums& block = shared<Sums>();
  const size_t row = size_t(blockIdx.x) * width;
  const bf16* normed = residual ? sum : x;
  float squares = 0, a[8], b[8];
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    load8(a, x + row + i);
    if (residual) {
      load8(b, residual + row + i);
#pragma unroll
      for (int k = 0; k < 8; k++) a[k] = to_float(to_bf16(a[k] + b[k]));
      store8(sum + row + i, a);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) squares += a[k] * a[k];
  }
  const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, block.parts) / float(width) + eps);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  // A thread reads what it has stored itself.
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    load8(a, normed + row + i);
    load8(b, weight + i);
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = a[k] * scale * (offset + b[k]);
    store8(y + row + i, a);
  }
}

// dx = d_residual + s · (w∘dy − x · s²/width · Σ x∘w∘dy), where w has its offset. d_residual may be absent.
KERNEL __launch_bounds__(THREADS)
    rms_norm_backward(bf16* dx, const bf16* dy, const bf16* d_residual, const bf16* x, const float* weight,
                      const float* scales, int width, float offset) {
  Sums& block = shared<Sums>();
  const size_t row = size_t(blockIdx.x) * width;
  const float scale = scales[blockIdx.x];
  float correlation = 0, a[8], w[8], d[8];
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    load8(a, x + row + i);
    load8(w, weight + i);
    load8(d, dy + row + i);
#pragma unroll
    for (int k = 0; k < 8; k++) correlation += a[k] * ((offset + w[k]) * d[k]);
  }
  const float pull = block_sum<THREADS>(correlation, block.parts) * scale * scale / float(width);
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    load8(a, x + row + i);
    load8(w, weight + i);
    load8(d, dy + row + i);
#pragma unroll
    for (int k = 0; k < 8; k++) d[k] = scale * ((offset + w[k]) * d[k] - a[k] * pull);
    if (d_residual) {
      load8(a, d_residual + row + i);
#pragma unroll
      for (int k = 0; k < 8; k++) d[k] += a[k];
    }
    store8(dx + row + i, d);
  }
}

// d_weight = Σ over rows of s · x∘dy, in two passes without atomics: parts [blocks of rows, width] of f32 first. A block is 256 columns
// by `rows_a_block` rows, and a thread one column.
KERNEL __launch_bounds__(THREADS)
    rms_norm_weight_backward(float* parts, const bf16* dy, const bf16* x, const float* scales, int rows, int width,
                             int rows_a_block) {
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width) return;
  const int first = blockIdx.y * rows_a_block, last = min(rows, first + rows_a_block);
  float sum = 0;
  for (int row = first; row < last; row++) {
    const size_t at = size_t(row) * width + column;
    sum += scales[row] * to_float(x[at]) * to_float(dy[at]);
  }
  parts[size_t(blockIdx.y) * width + column] = sum;
}

// to += Σ over parts, in their order.
KERNEL __launch_bounds__(THREADS) add_parts(float* to, const float* parts, int count, int width) {
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int part = 0; part < count; part++) sum += parts[size_t(part) * width + column];
  to[column] += sum;
}

}  // namespace

ENTRY(rms_norm)
ENTRY(rms_norm_backward)
ENTRY(rms_norm_weight_backward)
ENTRY(add_parts)
