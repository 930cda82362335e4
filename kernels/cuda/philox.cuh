// Counter-based random numbers: Philox4x32 with 7 rounds (Salmon et al., 2011), the same words as the CPU backend's.
#pragma once
#include "ptx.cuh"

struct Philox {
  uint32_t words[4];
};

__device__ __forceinline__ Philox philox(uint64_t counter, uint64_t key) {
  uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  uint32_t k[2] = {uint32_t(key), uint32_t(key >> 32)};
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = next[i];
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// In [0, 1), with 24 random bits.
__device__ __forceinline__ float unit(uint32_t bits) { return float(bits >> 8) / 16777216.0f; }
