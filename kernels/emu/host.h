// What a launcher sees of the emulation, by C: each function once for either build, as emu_fast_… and emu_checked_….
#pragma once
#include <cstddef>
#include <cstdint>

#include "emu.h"

#define EMU_EXPORT(name) EMU_JOIN(EMU, name)

extern "C" {

struct EMU_EXPORT(launch_config) {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  // Shared memory that the modelled card gives a block.
  uint32_t shared_limit;
  // 0 runs all in order; any other shuffles blocks, warps and lanes, and when copies land.
  uint64_t seed;
  // The blocks to run, by their linear numbers: all of them, or a few where memory for the others does not exist.
  uint64_t first_block, blocks;
};

// 0; or -1, and emu_…_error() says why.
int EMU_EXPORT(launch)(const EMU::Entry* entry, const EMU_EXPORT(launch_config) * config, void** arguments);
const char* EMU_EXPORT(error)();

// Memory that ends at a guard page, 16-byte aligned and filled with 0xff. Sparse memory is not filled: only what is touched exists.
void* EMU_EXPORT(allocate)(size_t bytes, const char* name, bool sparse);
void EMU_EXPORT(release)(void* memory);
// The host has written, or is to read. Checked: the number of bytes that nobody has written.
void EMU_EXPORT(written)(void* at, size_t bytes);
size_t EMU_EXPORT(unwritten)(const void* at, size_t bytes);
// Whether these bytes lie in one buffer.
bool EMU_EXPORT(holds)(const void* at, size_t bytes);

struct EMU_EXPORT(statistics) {
  uint64_t accesses, multiplications, matrix_loads, matrix_load_phases;
};
// Sums since the last call, of this OS thread.
EMU_EXPORT(statistics) EMU_EXPORT(take_statistics)();

uint32_t EMU_EXPORT(argument_count)(const EMU::Entry* entry);
uint32_t EMU_EXPORT(argument_size)(const EMU::Entry* entry, uint32_t index);

}  // extern "C"
