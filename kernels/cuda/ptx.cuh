// What C++ has no words for. This is the only file with inline assembly, and the only one that knows whether it is compiled for
// a device or, by emu/emu.h, for the CPU. (Layouts of fragments: PTX ISA 8, "Warp-level matrix instructions".)
#pragma once
#ifndef __CUDACC__
#include "emu.h"
#else
#include <cstddef>
#include <cstdint>
#include <cstring>

// A kernel, and its name for the launcher.
#define KERNEL extern "C" __global__ void
#define ENTRY(kernel)

// The block's shared memory. It is all dynamic, so that one launch parameter says how much there is.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return *reinterpret_cast<T*>(shared_bytes);
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float exp2_approx(float number) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(number));
  return power;
}

struct bf16 {
  uint16_t bits;
};
__device__ __forceinline__ bf16 to_bf16(float number) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(number));
  return rounded;
}
// To f16 and back.
__device__ __forceinline__ float rounded_to_f16(float number) {
  float rounded;
  asm("{ .reg .f16 half; cvt.rn.f16.f32 half, %1; cvt.f32.f16 %0, half; }" : "=f"(rounded) : "f"(number));
  return rounded;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 16 bytes from global to shared memory, past L1. Without `full` the source is not read, and the target is zero.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool full = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(full ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `Pending` groups have landed.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 8×8 matrices of 16 bits. Lanes 8i to 8i+7 give the rows of matrix i; lane l receives row l/4, columns 2(l%4) and the next.
__device__ __forceinline__ void load_matrix_x2(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// C += A·B for a warp's tile of Rows × Columns products of m16n8k16: bf16 in, f32 sums.
template <int Rows, int Columns>
__device__ __forceinline__ void multiply_tile(float (&c)[Rows][Columns][4], const uint32_t (&a)[Rows][4],
                                              const uint32_t (&b)[Columns][2]) {
#pragma unroll
  for (int row = 0; row < Rows; row++)
#pragma unroll
    for (int column = 0; column < Columns; column++) {
      float(&sum)[4] = c[row][column];
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[row][0]), "r"(a[row][1]), "r"(a[row][2]), "r"(a[row][3]), "r"(b[column][0]), "r"(b[column][1]));
    }
}
#endif

__device__ __forceinline__ float to_float(bf16 number) { return __uint_as_float(uint32_t(number.bits) << 16); }
