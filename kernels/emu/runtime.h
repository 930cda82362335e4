// The insides of the emulation. One OS thread runs one block at a time; its threads are fibers with stacks of their own, and the
// lanes of a warp meet where CUDA says that they do.
#pragma once
#include <string>
#include <vector>

#include "host.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace EMU {

#ifdef EMU_CHECKED
constexpr bool CHECKED = true;
#else
constexpr bool CHECKED = false;
#endif
constexpr int MOST_THREADS = 1024;
constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t PAGE_BYTES = 4096;
// Shared memory ends where the arena does, so that the first byte behind it faults.
constexpr size_t ARENA_BYTES = 256 << 10;
constexpr uint8_t POISON = 0xff;

enum class Meeting : uint8_t { None, SyncWarp, Shuffle, Ballot, LoadMatrix, Multiply, Barrier };

// A cp.async that has not landed.
struct PendingCopy {
  void* to;
  const void* from;
  uint8_t bytes, from_bytes;
  uint16_t group;
  const char* file;
  int line;
};

struct Warp;
struct Thread {
  Indices indices;
  void* stack_pointer = nullptr;
  void* stack = nullptr;
  Warp* warp = nullptr;
  uint16_t number = 0;  // in the block
  uint8_t lane = 0;
  uint8_t slot = 0;     // in its warp's order
  // Where it waits.
  Meeting meeting = Meeting::None;
  const char* file = nullptr;
  int line = 0;
  std::vector<PendingCopy> copies;
  uint16_t copy_group = 0;
};

struct Warp {
  Thread* slots[WARP];  // in the order in which they run, which the seed shuffles
  uint8_t slot_of[WARP];
  uint32_t lanes;  // that exist
  // By slot.
  uint32_t fresh, runnable;
  // By lane.
  uint32_t arrived, returned;
  // What the lanes bring to a meeting, and take from it.
  uint32_t mask[WARP];
  uint64_t value[WARP], result[WARP];
  int source[WARP];
  const void* row[WARP];
  struct {
    const uint32_t *a, *b;
    float* c;
  } tile[WARP];
  uint32_t matrix[WARP][4];
  // The first to arrive at a meeting of all lanes.
  Meeting meeting;
  const char* file;
  int line;
  uint32_t synced_at;  // the checker's time of the last __syncwarp
};

// Device memory.
struct Buffer {
  char* base;
  size_t bytes;
  char* mapped;
  size_t mapped_bytes;
  std::string name;
  // Checked: the last write and read of each byte.
  uint32_t *writes = nullptr, *reads = nullptr;
};

// All that an OS thread needs to run blocks.
struct Machine {
  void* scheduler = nullptr;  // its stack pointer, while a fiber runs
  Thread* running = nullptr;
  Thread threads[MOST_THREADS];
  Warp warps[MOST_THREADS / WARP];
  int thread_count = 0, warp_count = 0;
  int returned = 0, at_barrier = 0;
  char* stacks = nullptr;
  std::vector<void*> free_stacks;
  void* signal_stack = nullptr;

  char* arena = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;

  const Entry* entry = nullptr;
  void** arguments = nullptr;
  uint64_t random_state = 1;
  bool copies_land_at_once = false;
  bool failed = false;
  std::string error;
  EMU_EXPORT(statistics) statistics{};

  // The checker's clock: it advances at every barrier and __syncwarp.
  uint32_t now = 2, launch_began = 2, block_began = 2, barrier = 2;
  std::vector<uint32_t> shared_writes, shared_reads;
  Buffer* last_buffer = nullptr;
  uint64_t accesses_alone = 0;  // since another fiber ran

  uint32_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state >> 11;
  }
};

Machine& machine();             // of this OS thread
extern thread_local Machine* this_machine;  // or none yet

// Ends the launch with a message. It does not return to a fiber that calls it.
void fail(Machine& machine, const char* file, int line, const char* format, ...) __attribute__((format(printf, 4, 5)));
const char* name_of(Meeting meeting);

// block.cc
void wait_for_others(Machine& machine, Thread& thread);
void run_block(Machine& machine, uint3 block, uint3 grid, uint3 size, bool shuffled);

// memory.cc
Buffer* buffer_at(Machine& machine, const void* pointer);
std::string nearest_buffer(const void* pointer);
bool touched_behind_a_buffer(std::string& message);
void catch_faults();

// checker.cc: nothing in the fast build.
void check_access(Machine& machine, const void* at, size_t bytes, bool writes, const char* file, int line, void* code,
                  bool is_copy = false);
void mark_in_flight(Machine& machine, const void* at, size_t bytes);
void mark_landed(Machine& machine, const void* at, size_t bytes);
void begin_checked_block(Machine& machine);
void keep_time_in_range(Machine& machine);
std::string source_of(void* code);

inline bool is_shared(const Machine& machine, const void* at, size_t bytes) {
  const char* first = static_cast<const char*>(at);
  return first >= machine.shared && first + bytes <= machine.shared + machine.shared_bytes;
}

}  // namespace EMU
