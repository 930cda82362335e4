// The dynamic maps of 8 bits (Dettmers, 2016): 256 ascending values.
#pragma once
#include "ptx.cuh"

// The number of the value of an ascending map that is nearest; of two that are as near, the lower.
__device__ __forceinline__ uint32_t nearest_in_map(const float* map, float x) {
  int low = 0, high = 256;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (map[middle] < x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int above = min(max(low, 1), 255);
  return x > 0.5f * (map[above - 1] + map[above]) ? above : above - 1;
}
