// Where the lanes of a warp meet. Each brings its operands; the last to come does the work for all, and the others go on.
#include "runtime.h"

namespace EMU {

const char* name_of(Meeting meeting) {
  static const char* const names[] = {"no meeting", "__syncwarp", "shuffle", "ballot", "ldmatrix", "mma", "__syncthreads"};
  return names[static_cast<int>(meeting)];
}

static void tell_divergence(Machine& machine, const Thread& thread, const char* file, int line, int lane) {
  const Thread& other = *thread.warp->slots[thread.warp->slot_of[lane]];
  fail(machine, file, line, "divergent warp: lane %d is at the %s of %s:%d with mask %08x, lane %d at a %s with mask %08x",
       lane, name_of(other.meeting), other.file, other.line, thread.warp->mask[lane], thread.lane,
       name_of(thread.meeting), thread.warp->mask[thread.lane]);
}

// Whether this lane is the last of its mask. The others sleep here until that one has done the work.
static bool is_last(Machine& machine, Meeting meeting, uint32_t mask, const char* file, int line) {
  Thread& thread = *machine.running;
  Warp& warp = *thread.warp;
  mask &= warp.lanes;
  thread.meeting = meeting;
  thread.file = file, thread.line = line;
  warp.mask[thread.lane] = mask;
  if (!(mask >> thread.lane & 1)) {
    fail(machine, file, line, "%s: mask %08x does not name the calling lane %d", name_of(meeting), mask, thread.lane);
  }
  const bool is_whole = mask == warp.lanes;
  // Of a meeting of all lanes the first says what it is; the lanes of smaller ones are compared when all are there.
  if (is_whole && warp.arrived && (warp.meeting != meeting || warp.line != line || warp.file != file)) {
    tell_divergence(machine, thread, file, line, __builtin_ctz(warp.arrived));
  }
  if (!is_whole || !warp.arrived) {
    warp.meeting = is_whole ? meeting : Meeting::None;
    warp.file = file, warp.line = line;
  }
  warp.arrived |= 1u << thread.lane;
  if ((warp.arrived & mask) != mask) {
    wait_for_others(machine, thread);
    return false;
  }
  if (!is_whole) {
    for (uint32_t left = mask; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const Thread& other = *warp.slots[warp.slot_of[lane]];
      if (other.meeting != meeting || other.line != line || warp.mask[lane] != mask) {
        tell_divergence(machine, thread, file, line, lane);
      }
    }
  }
  return true;
}

static void let_go(Machine& machine) {
  const Thread& thread = *machine.running;
  Warp& warp = *thread.warp;
  const uint32_t mask = warp.mask[thread.lane];
  warp.arrived &= ~mask;
  for (uint32_t left = mask & ~(1u << thread.lane); left; left &= left - 1) {
    warp.runnable |= 1u << warp.slot_of[__builtin_ctz(left)];
  }
}

void sync_warp(uint32_t mask, const char* file, int line) {
  Machine& machine = *this_machine;
  if (!is_last(machine, Meeting::SyncWarp, mask, file, line)) return;
  machine.running->warp->synced_at = ++machine.now;
  let_go(machine);
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* file, int line) {
  Machine& machine = *this_machine;
  const int lane = machine.running->lane;
  Warp& warp = *machine.running->warp;
  warp.value[lane] = value;
  warp.source[lane] = source;
  if (is_last(machine, Meeting::Shuffle, mask, file, line)) {
    const uint32_t all = warp.mask[lane];
    for (uint32_t left = all; left; left &= left - 1) {
      const int to = __builtin_ctz(left), from = warp.source[to];
      if (!(all >> from & 1)) {
        fail(machine, file, line, "shuffle: lane %d reads lane %d, which mask %08x does not name", to, from, all);
      }
      warp.result[to] = warp.value[from];
    }
    let_go(machine);
  }
  return warp.result[lane];
}

uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line) {
  Machine& machine = *this_machine;
  const int lane = machine.running->lane;
  Warp& warp = *machine.running->warp;
  warp.value[lane] = predicate;
  if (is_last(machine, Meeting::Ballot, mask, file, line)) {
    uint32_t votes = 0;
    for (uint32_t left = warp.mask[lane]; left; left &= left - 1) {
      const int voter = __builtin_ctz(left);
      votes |= uint32_t(warp.value[voter]) << voter;
    }
    for (uint32_t left = warp.mask[lane]; left; left &= left - 1) warp.result[__builtin_ctz(left)] = votes;
    let_go(machine);
  }
  return uint32_t(warp.result[lane]);
}

uint4 load_matrix(int matrices, bool transposed, const void* row, const char* file, int line) {
  Machine& machine = *this_machine;
  const int lane = machine.running->lane;
  Warp& warp = *machine.running->warp;
  warp.row[lane] = row;
  if (lane < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail(machine, file, line, "ldmatrix: a row that is not 16-byte aligned");
    if (!is_shared(machine, row, 16)) {
      fail(machine, file, line, "ldmatrix: a row at byte %td of %zu bytes of shared memory",
           static_cast<const char*>(row) - machine.shared, machine.shared_bytes);
    }
    check_access(machine, row, 16, false, file, line, nullptr);
  }
  if (is_last(machine, Meeting::LoadMatrix, ~0u, file, line)) {
    machine.statistics.matrix_loads += matrices;
    for (int matrix = 0; matrix < matrices; matrix++) {
      uint16_t values[8][8];
      // Rows of one bank group are read one after the other: 1 phase is free of conflicts.
      uint8_t rows_of_bank[8] = {}, phases = 0;
      for (int i = 0; i < 8; i++) {
        const void* from = warp.row[8 * matrix + i];
        memcpy(values[i], from, 16);
        phases = std::max(phases, ++rows_of_bank[reinterpret_cast<uintptr_t>(from) / 16 % 8]);
      }
      machine.statistics.matrix_load_phases += phases;
      for (int to = 0; to < WARP; to++) {
        const int r = to / 4, c = 2 * (to % 4);
        const uint16_t low = transposed ? values[c][r] : values[r][c];
        const uint16_t high = transposed ? values[c + 1][r] : values[r][c + 1];
        warp.matrix[to][matrix] = low | uint32_t(high) << 16;
      }
    }
    let_go(machine);
  }
  const uint32_t* mine = warp.matrix[lane];
  return {mine[0], mine[1], mine[2], mine[3]};
}

static float low(uint32_t pair) { return __uint_as_float(pair << 16); }
static float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Fragments of m16n8k16, lane l with g = l/4 and q = l%4. A: rows g, g+8, g, g+8 by columns 2q, +1 (registers 2 and 3: + 8). B: rows 2q,
// +1 (register 1: + 8) by column g. C: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
struct FragmentA {
  float values[16][16];
};
struct FragmentB {
  float values[16][8];
};

static void gather(FragmentA& to, int lane, const uint32_t* registers) {
  const int g = lane / 4, q = lane % 4;
  for (int r = 0; r < 4; r++) {
    float* pair = &to.values[g + r % 2 * 8][2 * q + r / 2 * 8];
    pair[0] = low(registers[r]), pair[1] = high(registers[r]);
  }
}
static void gather(FragmentB& to, int lane, const uint32_t* registers) {
  const int g = lane / 4, q = lane % 4;
  for (int r = 0; r < 2; r++) {
    to.values[2 * q + 8 * r][g] = low(registers[r]);
    to.values[2 * q + 8 * r + 1][g] = high(registers[r]);
  }
}

// One product of a tile, for all lanes. Products of bf16 are exact in f32; the order of the sums is by k, as nobody documents it.
static void multiply(const Warp& warp, int index, const FragmentA& a, const FragmentB& b) {
  float sums[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const float* c = warp.tile[lane].c + 4 * index;
    memcpy(&sums[lane / 4][2 * (lane % 4)], c, 8);
    memcpy(&sums[lane / 4 + 8][2 * (lane % 4)], c + 2, 8);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) sums[row][column] += a.values[row][k] * b.values[k][column];
  for (int lane = 0; lane < WARP; lane++) {
    float* c = warp.tile[lane].c + 4 * index;
    memcpy(c, &sums[lane / 4][2 * (lane % 4)], 8);
    memcpy(c + 2, &sums[lane / 4 + 8][2 * (lane % 4)], 8);
  }
}

// mma.sync touches registers alone, so a whole tile is one meeting.
void multiply_tile(float* c, const uint32_t* a, const uint32_t* b, int rows, int columns, const char* file, int line) {
  Machine& machine = *this_machine;
  const int lane = machine.running->lane;
  Warp& warp = *machine.running->warp;
  warp.tile[lane] = {a, b, c};
  if (!is_last(machine, Meeting::Multiply, ~0u, file, line)) return;
  if (warp.lanes != ~0u) fail(machine, file, line, "mma: the warp has fewer than 32 lanes");
  machine.statistics.multiplications += rows * columns;
  constexpr int MOST_COLUMNS = 32;
  if (columns > MOST_COLUMNS) fail(machine, file, line, "mma: a tile of more than %d columns", MOST_COLUMNS);
  FragmentB right[MOST_COLUMNS];
  for (int column = 0; column < columns; column++)
    for (int from = 0; from < WARP; from++) gather(right[column], from, warp.tile[from].b + 2 * column);
  for (int row = 0; row < rows; row++) {
    FragmentA left;
    for (int from = 0; from < WARP; from++) gather(left, from, warp.tile[from].a + 4 * row);
    for (int column = 0; column < columns; column++) multiply(warp, row * columns + column, left, right[column]);
  }
  let_go(machine);
}

}  // namespace EMU
