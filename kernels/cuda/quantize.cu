// Weights in 4 and 8 bits, in the bytes of bitsandbytes' CPU library (Dettmers et al., 2022 and 2023), and back.
//
// 4 bits: blocks of 64 weights, each divided by its largest magnitude. Two weights a byte, the first in the high half. `code` is NF4
// or FP4: 16 values, then their numbers in ascending order, then the 15 midpoints between them. Scales may be nested: 8 bits of the
// dynamic map (256 values) in blocks of 256, less a common offset. 8 bits: a scale for each row, code · scale / 127.
// Bytes a weight: 2.5 to quantize or dequantize 4 bits, 3 for 8 bits.
#include "block.cuh"
#include "map.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int BLOCK = 64;          // weights that share a scale
constexpr int SCALE_BLOCK = 256;   // scales that share one

struct Code {
  float values[16];
  float midpoints[15];
  uint8_t order[16];
};

// The code whose value is nearest, as the number of midpoints below.
__device__ __forceinline__ uint32_t nearest(const Code& code, float scaled) {
  int below = 0;
#pragma unroll
  for (int i = 0; i < 15; i++) below += code.midpoints[i] < scaled;
  return code.order[below];
}

// Eight threads take a block of 64, eight weights each.
template <class T>
__device__ __forceinline__ void quantize_block(uint8_t* codes, float* absmax, const T* weights, const Code* from,
                                               long long count) {
  Code& code = shared<Code>();
  if (threadIdx.x == 0) code = *from;
  __syncthreads();
  const long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * 8;
  const long long block = i / BLOCK;
  const bool is_whole = (block + 1) * BLOCK <= count;
  float values[8];
#pragma unroll
  for (int k = 0; k < 8; k++) values[k] = i + k < count ? load1(weights + i + k) : 0.0f;
  float largest = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) largest = max(largest, fabsf(values[k]));
#pragma unroll
  for (int distance = 4; distance; distance /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  if (i >= count) return;
  if (i % BLOCK == 0) absmax[block] = largest;
  const float divisor = max(largest, 1e-38f), inverse = 1.0f / divisor;
  // bitsandbytes multiplies whole blocks by the inverse, and divides a ragged last one. Behind the last weight is a zero.
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    if (i + k >= count) break;
    uint32_t byte = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float value = values[k + half];
      const float scaled = is_whole ? value * inverse : value / divisor;
      byte = byte << 4 | nearest(code, scaled);
    }
    codes[(i + k) / 2] = uint8_t(byte);
  }
}

KERNEL __launch_bounds__(THREADS)
    quantize_4bit_f32(uint8_t* codes, float* absmax, const float* weights, const Code* code, long long count) {
  quantize_block(codes, absmax, weights, code, count);
}
KERNEL __launch_bounds__(THREADS)
    quantize_4bit_bf16(uint8_t* codes, float* absmax, const bf16* weights, const Code* code, long long count) {
  quantize_block(codes, absmax, weights, code, count);
}

struct Totals {
  double parts[THREADS / 32];
};

// The mean of all scales, summed in f64. One block.
KERNEL __launch_bounds__(THREADS) mean_of_scales(float* mean, const float* scales, long long count) {
  Totals& block = shared<Totals>();
  double sum = 0;
  for (long long i = threadIdx.x; i < count; i += THREADS) sum += double(scales[i]);
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) *mean = float(sum / double(count));
}

struct Nesting {
  float map[SCALE_BLOCK];
  float parts[THREADS / 32];
};

// x in [−1, 1] is one of 65,536 steps first, as bitsandbytes' CPU library has it.
__device__ __forceinline__ float on_grid(float x) {
  const uint32_t step = uint32_t((min(max(x, -1.0f), 1.0f) + 1.0f) * 0.5f * 65535.0f + 0.5f);
  return -1.0f + 2.0f * float(step) / 65535.0f;
}

// One block of threads takes one block of scales.
KERNEL __launch_bounds__(SCALE_BLOCK)
    nest_scales(uint8_t* codes, float* absmax, const float* scales, const float* mean, const float* map,
                long long count) {
  Nesting& block = shared<Nesting>();
  block.map[threadIdx.x] = map[threadIdx.x];
  const long long i = blockIdx.x * (long long)SCALE_BLOCK + threadIdx.x;
  const float centred = i < count ? scales[i] - *mean : 0.0f;
  // Its barriers are those of the map too.
  const float largest = block_max<SCALE_BLOCK>(fabsf(centred), block.parts);
  if (threadIdx.x == 0) absmax[blockIdx.x] = largest;
  if (i >= count) return;
  const float inverse = 1.0f / largest;
  codes[i] = uint8_t(largest > 0 ? nearest_in_map(block.map, on_grid(centred * inverse)) : 0);
}

// Scales of a tensor, nested or not.
struct Scales {
  const float* absmax;         // plain: of each block of weights; nested: of each block of scales
  const uint8_t* nested;       // null if plain
  const float* map;
  const float* mean;
};

struct Tables {
  float values[16];
  float map[SCALE_BLOCK];
};

// 16 weights a thread: one load of 8 bytes, two stores of 16.
KERNEL __launch_bounds__(THREADS)
    dequantize_4bit(bf16* weights, const uint8_t* codes, Scales scales, const Code* code, long long count) {
  Tables& tables = shared<Tables>();
  if (threadIdx.x < 16) tables.values[threadIdx.x] = code->values[threadIdx.x];
  if (scales.nested) tables.map[threadIdx.x] = scales.map[threadIdx.x];
  __syncthreads();
  const long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * 16;
  if (i >= count) return;
  const long long block = i / BLOCK;
  const float scale = scales.nested
                          ? tables.map[scales.nested[block]] * scales.absmax[block / SCALE_BLOCK] + *scales.mean
                          : scales.absmax[block];
  if (i + 16 <= count) {
    const uint2 packed = *reinterpret_cast<const uint2*>(codes + i / 2);
    const uint32_t words[2] = {packed.x, packed.y};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float values[8];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t byte = words[half] >> (8 * k) & 255;
        values[2 * k] = tables.values[byte >> 4] * scale;
        values[2 * k + 1] = tables.values[byte & 15] * scale;
      }
      store8(weights + i + 8 * half, values);
    }
    return;
  }
  for (long long k = i; k < count; k++) {
    const uint32_t byte = codes[k / 2];
    weights[k] = to_bf16(tables.values[k % 2 ? byte & 15 : byte >> 4] * scale);
  }
}

struct RowMax {
  float parts[THREADS / 32];
};

// One block a row. bitsandbytes rounds to f16 first.
template <class T>
__device__ __forceinline__ void quantize_row(int8_t* codes, float* absmax, const T* weights, int width) {
  RowMax& block = shared<RowMax>();
  const size_t row = size_t(blockIdx.x) * width;
  float largest = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) largest = max(largest, fabsf(rounded_to_f16(load1(weights + row + i))));
  largest = block_max<THREADS>(largest, block.parts);
  if (threadIdx.x == 0) absmax[blockIdx.x] = largest;
  const float factor = largest > 0 ? 1.0f / largest * 127.0f : 0.0f;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    codes[row + i] = int8_t(__float2int_rn(rounded_to_f16(load1(weights + row + i)) * factor));
  }
}

KERNEL __launch_bounds__(THREADS) quantize_8bit_f32(int8_t* codes, float* absmax, const float* weights, int width) {
  quantize_row(codes, absmax, weights, width);
}
KERNEL __launch_bounds__(THREADS) quantize_8bit_bf16(int8_t* codes, float* absmax, const bf16* weights, int width) {
  quantize_row(codes, absmax, weights, width);
}

KERNEL __launch_bounds__(THREADS) dequantize_8bit(bf16* weights, const int8_t* codes, const float* absmax, int width) {
  const size_t row = size_t(blockIdx.y) * width;
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < width) weights[row + i] = to_bf16(float(codes[row + i]) * (absmax[blockIdx.y] / 127.0f));
}

}  // namespace

ENTRY(quantize_4bit_f32)
ENTRY(quantize_4bit_bf16)
ENTRY(mean_of_scales)
ENTRY(nest_scales)
ENTRY(dequantize_4bit)
ENTRY(quantize_8bit_f32)
ENTRY(quantize_8bit_bf16)
ENTRY(dequantize_8bit)
