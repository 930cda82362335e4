// The gated product of an MLP (Shazeer, 2020), element by element: y = activation(gate) · up, with SiLU or GELU by tanh.
// All: bf16 [count], count a multiple of 8. A thread takes 8. Bytes: forward 6 · count, backward 10 · count.
#include "block.cuh"

namespace {

constexpr int THREADS = 256;
enum Activation { SILU = 0, GELU_TANH = 1 };

struct Slope {
  float value, derivative;
};

__device__ __forceinline__ Slope silu(float x) {
  const float s = 1.0f / (1.0f + expf(-x)), y = x * s;
  return {y, s + y * (1.0f - s)};
}

// ½x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))).
__device__ __forceinline__ Slope gelu_tanh(float x) {
  constexpr float ROOT = 0.7978845608f, CUBE = 0.044715f;
  const float t = tanhf(ROOT * (x + CUBE * x * x * x)), inner = ROOT * (1.0f + 3.0f * CUBE * x * x);
  return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
}

__device__ __forceinline__ Slope activated(int activation, float x) {
  return activation == SILU ? silu(x) : gelu_tanh(x);
}

KERNEL __launch_bounds__(THREADS) gated(bf16* y, const bf16* gate, const bf16* up, long long count, int activation) {
  const long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * 8;
  if (i >= count) return;
  float g[8], u[8];
  load8(g, gate + i);
  load8(u, up + i);
#pragma unroll
  for (int k = 0; k < 8; k++) g[k] = activated(activation, g[k]).value * u[k];
  store8(y + i, g);
}

// d_gate = dy · up · activation'(gate), d_up = dy · activation(gate). They may lie where gate and up do.
KERNEL __launch_bounds__(THREADS)
    gated_backward(bf16* d_gate, bf16* d_up, const bf16* dy, const bf16* gate, const bf16* up, long long count,
                   int activation) {
  const long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * 8;
  if (i >= count) return;
  float g[8], u[8], d[8];
  load8(g, gate + i);
  load8(u, up + i);
  load8(d, dy + i);
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const Slope slope = activated(activation, g[k]);
    g[k] = d[k] * u[k] * slope.derivative;
    u[k] = d[k] * slope.value;
  }
  store8(d_gate + i, g);
  store8(d_up + i, u);
}

}  // namespace

ENTRY(gated)
ENTRY(gated_backward)
