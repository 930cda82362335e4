// Kernels with one defect each, and sound ones, for the test of the checker. `data` has `count` numbers of f32, and a block 64 threads.
#include "ptx.cuh"

namespace {

struct Pair {
  float first[64], second[64];
};

KERNEL sound_exchange(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = block.first[63 - threadIdx.x];
}

KERNEL sound_half_masks(float* data, int) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    value += __shfl_xor_sync(0xffffu, value, 1);
  } else {
    value += __shfl_xor_sync(0xffff0000u, value, 2);
  }
  data[threadIdx.x] = value;
}

KERNEL sound_within_a_warp(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  data[threadIdx.x] = block.first[threadIdx.x ^ 1];
  __syncwarp();
  block.first[threadIdx.x ^ 1] = 2;
}

KERNEL sound_copy(float* data, int) {
  Pair& block = shared<Pair>();
  if (threadIdx.x < 16) copy_async16(block.first + threadIdx.x * 4, data + threadIdx.x * 4);
  copy_async_commit();
  if (threadIdx.x < 16) copy_async16(block.second + threadIdx.x * 4, data, false);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  const float value = block.first[63 - threadIdx.x];
  copy_async_wait<0>();
  __syncthreads();
  data[threadIdx.x] = value + block.second[threadIdx.x];
}

KERNEL sound_early_return(float* data, int) {
  if (threadIdx.x >= 32) return;
  data[threadIdx.x] = __shfl_sync(~0u, data[threadIdx.x], 3);
}

KERNEL divergent_barrier(float* data, int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    data[threadIdx.x] = 0;
    __syncthreads();
  }
}

KERNEL barrier_after_return(float*, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

KERNEL barrier_of_half_a_warp(float*, int) {
  if (threadIdx.x % 2) __syncthreads();
  __syncwarp();
}

KERNEL shuffle_in_a_branch(float* data, int) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 2) value += __shfl_xor_sync(~0u, value, 1);
  data[threadIdx.x] = value;
}

KERNEL shuffle_in_two_branches(float* data, int) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 2) {
    value += __shfl_xor_sync(~0u, value, 1);
  } else {
    value += __shfl_xor_sync(~0u, value, 2);
  }
  data[threadIdx.x] = value;
}

KERNEL shuffle_outside_its_mask(float* data, int) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffu, value, 1);
  data[threadIdx.x] = value;
}

KERNEL shuffle_from_outside_its_mask(float* data, int) {
  float value = data[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffffu, value, 16);
  data[threadIdx.x] = value;
}

KERNEL write_behind_the_end(float* data, int count) {
  if (threadIdx.x == 0) data[count] = 1;
}

KERNEL write_before_the_beginning(float* data, int) {
  if (threadIdx.x == 0) data[-1] = 1;
}

KERNEL read_behind_the_end(float* data, int count) {
  const float value = data[count + threadIdx.x / 63];
  if (value == 3.25f) data[0] = value;
}

KERNEL shared_memory_behind_the_end(float* data, int) {
  float* block = &shared<float>();
  block[threadIdx.x * 2 + 4] = 1;
  __syncthreads();
  data[threadIdx.x] = block[4];
}

KERNEL index_behind_an_array(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x + 1] = 1;
  __syncthreads();
  data[threadIdx.x] = block.first[1];
}

KERNEL misaligned_vector(float* data, int) {
  const float4 value = *reinterpret_cast<float4*>(data + 1);
  data[0] = value.x;
}

KERNEL unwritten_shared_memory(float* data, int) {
  Pair& block = shared<Pair>();
  if (threadIdx.x) block.first[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = block.first[0];
}

KERNEL race_within_a_warp(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = float(threadIdx.x);
  data[threadIdx.x] = block.first[threadIdx.x ^ 1];
}

KERNEL race_past_a_warp_barrier(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  data[threadIdx.x] = block.first[threadIdx.x ^ 32];
}

KERNEL race_of_a_write_and_a_read_before(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = 1;
  __syncthreads();
  const float value = block.first[63 - threadIdx.x];
  block.first[threadIdx.x] = 2;
  data[threadIdx.x] = value;
}

KERNEL race_of_two_writes(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x / 2] = float(threadIdx.x);
  __syncthreads();
  data[threadIdx.x] = block.first[0];
}

KERNEL race_in_device_memory(float* data, int) { data[threadIdx.x] = data[63 - threadIdx.x]; }

KERNEL race_between_blocks(float* data, int) {
  if (threadIdx.x == 0) data[0] += 1;
}

KERNEL copy_without_a_wait(float* data, int) {
  Pair& block = shared<Pair>();
  if (threadIdx.x < 16) copy_async16(block.first + threadIdx.x * 4, data + threadIdx.x * 4);
  copy_async_commit();
  __syncthreads();
  const float value = block.first[threadIdx.x];
  copy_async_wait<0>();
  data[threadIdx.x] = value;
}

KERNEL copy_without_a_barrier(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 16) copy_async16(block.first + threadIdx.x * 4, data + threadIdx.x * 4);
  copy_async_commit();
  copy_async_wait<0>();
  data[threadIdx.x] = block.first[63 - threadIdx.x];
}

KERNEL copy_waited_for_too_early(float* data, int) {
  Pair& block = shared<Pair>();
  if (threadIdx.x < 16) copy_async16(block.first + threadIdx.x * 4, data + threadIdx.x * 4);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  const float value = block.first[threadIdx.x];
  copy_async_wait<0>();
  __syncthreads();
  data[threadIdx.x] = value;
}

KERNEL copy_that_is_never_waited_for(float* data, int) {
  if (threadIdx.x < 16) copy_async16(shared<Pair>().first + threadIdx.x * 4, data + threadIdx.x * 4);
}

KERNEL copy_from_behind_the_end(float* data, int) {
  Pair& block = shared<Pair>();
  if (threadIdx.x < 16) copy_async16(block.first + threadIdx.x * 4, data + 4 + threadIdx.x * 4);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  data[threadIdx.x] = block.first[threadIdx.x];
}

KERNEL copy_to_a_misaligned_target(float* data, int) {
  if (threadIdx.x == 2) copy_async16(shared<Pair>().first + 1, data);
  copy_async_commit();
  copy_async_wait<0>();
}

KERNEL matrix_behind_the_end(float* data, int) {
  Pair& block = shared<Pair>();
  block.first[threadIdx.x] = block.second[threadIdx.x] = 0;
  __syncthreads();
  uint32_t registers[4];
  load_matrix_x4(registers, block.first + threadIdx.x % 32 * 8);
  data[threadIdx.x] = float(registers[0]);
}

KERNEL stack_overflow(float* data, int) {
  volatile float large[40000];
  for (int i = 0; i < 40000; i += 100) large[i] = float(i);
  data[threadIdx.x] = large[100];
}

KERNEL integer_overflow(float* data, int count) {
  const int large = count << 24;
  data[(large * 2 + threadIdx.x) & 63] = 1;
}

KERNEL wait_for_another_block(float* data, int) {
  volatile float* flag = data;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    while (*flag != -5) {
    }
}

}  // namespace

ENTRY(sound_exchange)
ENTRY(sound_half_masks)
ENTRY(sound_within_a_warp)
ENTRY(sound_copy)
ENTRY(sound_early_return)
ENTRY(divergent_barrier)
ENTRY(barrier_after_return)
ENTRY(barrier_of_half_a_warp)
ENTRY(shuffle_in_a_branch)
ENTRY(shuffle_in_two_branches)
ENTRY(shuffle_outside_its_mask)
ENTRY(shuffle_from_outside_its_mask)
ENTRY(write_behind_the_end)
ENTRY(write_before_the_beginning)
ENTRY(read_behind_the_end)
ENTRY(shared_memory_behind_the_end)
ENTRY(index_behind_an_array)
ENTRY(misaligned_vector)
ENTRY(unwritten_shared_memory)
ENTRY(race_within_a_warp)
ENTRY(race_past_a_warp_barrier)
ENTRY(race_of_a_write_and_a_read_before)
ENTRY(race_of_two_writes)
ENTRY(race_in_device_memory)
ENTRY(race_between_blocks)
ENTRY(copy_without_a_wait)
ENTRY(copy_without_a_barrier)
ENTRY(copy_waited_for_too_early)
ENTRY(copy_that_is_never_waited_for)
ENTRY(copy_from_behind_the_end)
ENTRY(copy_to_a_misaligned_target)
ENTRY(matrix_behind_the_end)
ENTRY(stack_overflow)
ENTRY(integer_overflow)
ENTRY(wait_for_another_block)
