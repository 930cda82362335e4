// The part of CUDA that our kernels use, for the host's C++ compiler. A kernel's source is the same for both: ptx.cuh includes
// this file where nvcc is not the compiler. The threads of a block are fibers of one OS thread; runtime.h has their side.
//
// The kernels are compiled twice. The checked build reports every access of memory to checker.cc; the fast build reports none.
// Each has a namespace and a prefix of its own, so that one program may hold both.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "shim/vectors.h"

#ifdef EMU_CHECKED
#define EMU emu_checked
#else
#define EMU emu_fast
#endif
#define EMU_JOIN_(a, b) a##_##b
#define EMU_JOIN(a, b) EMU_JOIN_(a, b)

// Where a kernel calls; for messages.
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace EMU {

struct Indices {
  uint3 thread, block, block_size, grid_size;
};
// Of the thread that runs.
extern __thread const Indices* indices;

void sync_threads(const char* file, int line);
void sync_warp(uint32_t mask, const char* file, int line);
uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* file, int line);
uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line);
uint4 load_matrix(int matrices, bool transposed, const void* row, const char* file, int line);
void multiply_tile(float* c, const uint32_t* a, const uint32_t* b, int rows, int columns, const char* file, int line);
void copy_async(void* to, const void* from, int bytes, int from_bytes, const char* file, int line);
void copy_commit();
void copy_wait(int pending);
void* shared_memory();

// A kernel that can be launched: where its arguments lie is told as to cuLaunchKernel.
constexpr int MOST_ARGUMENTS = 24;
struct Entry {
  const char* name;
  void (*run)(void** arguments);
  uint32_t arguments;
  uint32_t sizes[MOST_ARGUMENTS];
};

template <auto Kernel>
struct Call;
template <class... A, void (*Kernel)(A...)>
struct Call<Kernel> {
  static_assert(sizeof...(A) <= MOST_ARGUMENTS, "a kernel of too many arguments");
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) static void spread(void** arguments, std::index_sequence<I...>) {
    Kernel(*static_cast<A*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void run(void** arguments) {
    spread(arguments, std::index_sequence_for<A...>{});
  }
  static constexpr Entry entry(const char* name) { return {name, run, sizeof...(A), {uint32_t(sizeof(A))...}}; }
};

}  // namespace EMU

#define KERNEL static __attribute__((noinline)) void
#define ENTRY(kernel)                          \
  extern "C" const EMU::Entry EMU_JOIN(EMU, kernel); \
  const EMU::Entry EMU_JOIN(EMU, kernel) = EMU::Call<&kernel>::entry(#kernel);
#define __device__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (EMU::indices->thread)
#define blockIdx (EMU::indices->block)
#define blockDim (EMU::indices->block_size)
#define gridDim (EMU::indices->grid_size)

template <class T>
inline T& shared() {
  return *static_cast<T*>(EMU::shared_memory());
}

inline void __syncthreads(EMU_SITE) { EMU::sync_threads(file, line); }
inline void __syncwarp(uint32_t mask = ~0u, EMU_SITE) { EMU::sync_warp(mask, file, line); }

namespace EMU {
template <class T>
inline T shuffled(uint32_t mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle of more than 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
}
}  // namespace EMU

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, EMU_SITE) {
  return EMU::shuffled(mask, value, source & 31, file, line);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, EMU_SITE) {
  return EMU::shuffled(mask, value, EMU::lane() ^ bits, file, line);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, int by, EMU_SITE) {
  const int lane = EMU::lane();
  return EMU::shuffled(mask, value, lane >= by ? lane - by : lane, file, line);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, int by, EMU_SITE) {
  const int lane = EMU::lane();
  return EMU::shuffled(mask, value, lane + by < 32 ? lane + by : lane, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMU_SITE) {
  return EMU::ballot(mask, predicate, file, line);
}
inline bool __any_sync(uint32_t mask, bool predicate, EMU_SITE) {
  return EMU::ballot(mask, predicate, file, line) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, EMU_SITE) {
  return EMU::ballot(mask, predicate, file, line) == mask;
}

using std::max;
using std::min;
inline float __uint_as_float(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
inline uint32_t __float_as_uint(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return bits;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __float2int_rn(float number) { return int(std::nearbyint(number)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float number) { return 1.0f / std::sqrt(number); }

// What ptx.cuh does by PTX on a device.
inline float exp2_approx(float number) { return std::exp2(number); }
struct bf16 {
  uint16_t bits;
};
// To nearest, ties to even; a NaN is 0x7fff, as cvt.rn.bf16.f32 has it.
inline bf16 to_bf16(float number) {
  const uint32_t bits = __float_as_uint(number);
  return {uint16_t(number != number ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float rounded_to_f16(float number) { return float(_Float16(number)); }
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16; }
inline void copy_async16(void* to, const void* from, bool full = true, EMU_SITE) {
  EMU::copy_async(to, from, 16, full ? 16 : 0, file, line);
}
inline void copy_async_commit() { EMU::copy_commit(); }
template <int Pending>
inline void copy_async_wait() {
  EMU::copy_wait(Pending);
}
inline void load_matrix_x2(uint32_t (&registers)[2], const void* row, EMU_SITE) {
  const uint4 all = EMU::load_matrix(2, false, row, file, line);
  registers[0] = all.x, registers[1] = all.y;
}
inline void load_matrix_x4(uint32_t (&registers)[4], const void* row, EMU_SITE) {
  const uint4 all = EMU::load_matrix(4, false, row, file, line);
  memcpy(registers, &all, 16);
}
inline void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row, EMU_SITE) {
  const uint4 all = EMU::load_matrix(4, true, row, file, line);
  memcpy(registers, &all, 16);
}
template <int Rows, int Columns>
inline void multiply_tile(float (&c)[Rows][Columns][4], const uint32_t (&a)[Rows][4], const uint32_t (&b)[Columns][2],
                          EMU_SITE) {
  EMU::multiply_tile(c[0][0], a[0], b[0], Rows, Columns, file, line);
}
