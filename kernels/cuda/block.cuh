// What several kernels share: eight numbers of bf16 at a time, and sums over a block in an order that never changes.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ float load1(const float* from) { return *from; }
__device__ __forceinline__ float load1(const bf16* from) { return to_float(*from); }

__device__ __forceinline__ void load8(float (&to)[8], const bf16* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(pairs[i] << 16);
    to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void load8(float (&to)[8], const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

__device__ __forceinline__ void store8(bf16* to, const float (&from)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                                             pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value = max(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// Folds the values of a block's warps in their order. `parts` has a place for each warp; a barrier at the end frees it again.
template <int Threads, class T, class Fold>
__device__ __forceinline__ T block_fold(T of_warp, T* parts, Fold fold) {
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = of_warp;
  __syncthreads();
  T all = parts[0];
#pragma unroll
  for (int warp = 1; warp < Threads / 32; warp++) all = fold(all, parts[warp]);
  __syncthreads();
  return all;
}

// Of a block of `Threads`, a multiple of 32.
template <int Threads, class T>
__device__ __forceinline__ T block_sum(T value, T* parts) {
  return block_fold<Threads>(warp_sum(value), parts, [](T a, T b) { return a + b; });
}

template <int Threads>
__device__ __forceinline__ float block_max(float value, float* parts) {
  return block_fold<Threads>(warp_max(value), parts, [](float a, float b) { return max(a, b); });
}
