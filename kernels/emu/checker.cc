// The checked build's shadow: for each byte of shared and device memory, who wrote it last, who read it last, and when.
//
// The kernels are compiled with -fsanitize=thread and other sanitizers, but linked against the functions at the end of this file,
// never against a sanitizer's library. So every access that the compiler emits is looked up here, and sources stay plain CUDA.
//
// Time is a number that advances at each barrier and each __syncwarp. Two accesses of one byte are a race if no such event orders
// them, whatever the order in which the fibers happened to run.
#include <dlfcn.h>
#include <link.h>

#include <cstdarg>
#include <cstdio>

#include "runtime.h"

namespace EMU {

// A record is time << 11 | who. Who is a thread of the block, or several of them.
constexpr int WHO_BITS = 11;
constexpr uint32_t WHO = (1u << WHO_BITS) - 1;
constexpr uint32_t WARPS = 1024;    // + a warp's number: several of its lanes
constexpr uint32_t SEVERAL = WHO;   // lanes of several warps
constexpr uint32_t NEVER = 0, HOST = 1, IN_FLIGHT = ~0u;
// Times that fit a record; a launch that gets near is renumbered.
constexpr uint32_t LAST_TIME = (1u << (32 - WHO_BITS)) - 2;
// A thread that has made so many accesses while no other ran spins: it waits for what can't happen.
constexpr uint64_t MOST_ACCESSES_ALONE = 1ull << 24;

// The file and line of an instruction.
std::string source_of(void* code) {
  Dl_info info;
  struct link_map* image = nullptr;
  if (!dladdr1(code, &info, reinterpret_cast<void**>(&image), RTLD_DL_LINKMAP) || !info.dli_fname) return "?";
  char command[500];
  snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           reinterpret_cast<size_t>(code) - 1 - image->l_addr);
  std::string place = "?";
  if (FILE* pipe = popen(command, "r")) {
    char line[300];
    if (fgets(line, sizeof line, pipe)) place = std::string(line, strcspn(line, "\n"));
    pclose(pipe);
  }
  return place;
}

#ifndef EMU_CHECKED

void check_access(Machine&, const void*, size_t, bool, const char*, int, void*, bool) {}
void mark_in_flight(Machine&, const void*, size_t) {}
void mark_landed(Machine&, const void*, size_t) {}
void begin_checked_block(Machine&) {}
void keep_time_in_range(Machine&) {}

#else

namespace {

// An access, and where it is in the source.
struct Access {
  const char* at;
  size_t bytes;
  bool writes, is_copy;
  const char* file;
  int line;
  void* code;

  const char* name() const { return is_copy ? "cp.async" : writes ? "write" : "read"; }
};

void complain(Machine& machine, const Access& access, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
void complain(Machine& machine, const Access& access, const char* format, ...) {
  char words[600];
  va_list rest;
  va_start(rest, format);
  vsnprintf(words, sizeof words, format, rest);
  va_end(rest);
  if (access.file) fail(machine, access.file, access.line, "%s", words);
  fail(machine, nullptr, 0, "%s at %s", words, source_of(access.code).c_str());
}

std::string name_of_who(uint32_t record) {
  const uint32_t who = record & WHO;
  if (who == SEVERAL) return "threads of several warps";
  return who < WARPS ? "thread " + std::to_string(who) : "lanes of warp " + std::to_string(who - WARPS);
}

// Whether nothing orders the access of a record and one of this thread now.
bool is_unordered(const Machine& machine, const Thread& thread, uint32_t record) {
  const uint32_t time = record >> WHO_BITS, who = record & WHO;
  if (time < machine.launch_began) return false;
  if (time < machine.block_began) return true;  // another block of this launch
  if (time < machine.barrier || who == thread.number) return false;
  const uint32_t warp = who < WARPS ? who / WARP : who - WARPS;
  return !(warp == thread.number / WARP && time < thread.warp->synced_at);
}

// Who has read a byte since the last barrier, with this thread.
uint32_t with_reader(const Machine& machine, const Thread& thread, uint32_t record) {
  const uint32_t who = record & WHO, me = thread.number;
  if (record == NEVER || record >> WHO_BITS < machine.barrier || who == me) return me;
  const uint32_t warp = who < WARPS ? who / WARP : who - WARPS;
  return who != SEVERAL && warp == me / WARP ? WARPS + warp : SEVERAL;
}

// Constants and tables of the program.
bool is_in_program(const void* at) {
  static const auto range = [] {
    std::pair<uintptr_t, uintptr_t> range{~uintptr_t(0), 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* raw) {
          auto& range = *static_cast<std::pair<uintptr_t, uintptr_t>*>(raw);
          for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            range.first = std::min<uintptr_t>(range.first, info->dlpi_addr + segment.p_vaddr);
            range.second = std::max<uintptr_t>(range.second, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
          }
          return 1;  // the first is the program
        },
        &range);
    return range;
  }();
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  return address >= range.first && address < range.second;
}

// The records of some bytes.
struct Shadow {
  uint32_t *writes, *reads;
  const char* space;
  ptrdiff_t offset;
};

// False where nothing is to be checked: a thread's own stack, its indices, constants.
bool find_shadow(Machine& machine, const Access& access, Shadow& shadow) {
  const char* at = access.at;
  if (size_t(at - machine.stacks) < MOST_THREADS * STACK_BYTES) return false;
  if (size_t(at - reinterpret_cast<const char*>(&machine)) < sizeof machine) return false;
  if (size_t(at - machine.arena) < 2 * ARENA_BYTES) {
    shadow.offset = at - machine.shared;
    if (!is_shared(machine, at, access.bytes)) {
      complain(machine, access, "%s of %zu bytes at byte %td of %zu bytes of shared memory", access.name(),
               access.bytes, shadow.offset, machine.shared_bytes);
    }
    shadow.space = "shared";
    shadow.writes = &machine.shared_writes[shadow.offset];
    shadow.reads = &machine.shared_reads[shadow.offset];
    return true;
  }
  if (Buffer* buffer = buffer_at(machine, at)) {
    shadow.offset = at - buffer->base;
    if (shadow.offset + access.bytes > buffer->bytes) {
      complain(machine, access, "%s of %zu bytes at byte %td of '%s', which has %zu", access.name(), access.bytes,
               shadow.offset, buffer->name.c_str(), buffer->bytes);
    }
    shadow.space = buffer->name.c_str();
    shadow.writes = buffer->writes + shadow.offset;
    shadow.reads = buffer->reads + shadow.offset;
    return true;
  }
  if (at == reinterpret_cast<const char*>(&indices) || is_in_program(at)) return false;
  complain(machine, access, "%s of %zu bytes out of bounds: %s", access.name(), access.bytes,
           nearest_buffer(at).c_str());
  return false;
}

void check_byte(Machine& machine, const Thread& thread, const Access& access, const Shadow& shadow, size_t i) {
  const uint32_t written = shadow.writes[i], read = shadow.reads[i];
  const ptrdiff_t at = shadow.offset + ptrdiff_t(i);
  auto whose = [&](uint32_t record) {
    return record >> WHO_BITS < machine.block_began ? std::string("another block") : name_of_who(record);
  };
  if (written == IN_FLIGHT) {
    complain(machine, access, "%s of byte %td of %s, where a cp.async has not been waited for", access.name(), at,
             shadow.space);
  }
  if (!access.writes && written == NEVER) {
    complain(machine, access, "read of byte %td of %s, which nobody has written", at, shadow.space);
  }
  if (written > HOST && is_unordered(machine, thread, written)) {
    complain(machine, access, "race: %s of byte %td of %s, written by %s with no barrier between", access.name(), at,
             shadow.space, whose(written).c_str());
  }
  if (access.writes && read != NEVER && is_unordered(machine, thread, read)) {
    complain(machine, access, "race: %s of byte %td of %s, read by %s with no barrier between", access.name(), at,
             shadow.space, whose(read).c_str());
  }
}

}  // namespace

void check_access(Machine& machine, const void* at, size_t bytes, bool writes, const char* file, int line, void* code,
                  bool is_copy) {
  const Thread& thread = *machine.running;
  const Access access{static_cast<const char*>(at), bytes, writes, is_copy, file, line, code};
  machine.statistics.accesses++;
  if (++machine.accesses_alone > MOST_ACCESSES_ALONE) {
    machine.accesses_alone = 0;
    complain(machine, access, "a thread spins: blocks run one after the other here, and can't wait for each other");
  }
  Shadow shadow;
  if (!find_shadow(machine, access, shadow)) return;
  // Most accesses are of bytes with one history: one look for all of them.
  uint32_t differs = 0;
  for (size_t i = 1; i < bytes; i++) {
    differs |= (shadow.writes[i] ^ shadow.writes[0]) | (shadow.reads[i] ^ shadow.reads[0]);
  }
  const uint32_t me = machine.now << WHO_BITS | thread.number;
  const size_t step = differs ? 1 : bytes;
  for (size_t i = 0; i < bytes; i += step) {
    check_byte(machine, thread, access, shadow, i);
    const uint32_t reader = machine.now << WHO_BITS | with_reader(machine, thread, shadow.reads[i]);
    for (size_t k = i; k < i + step; k++) {
      if (writes) {
        shadow.writes[k] = me;
      } else {
        shadow.reads[k] = reader;
      }
    }
  }
}

static void mark(Machine& machine, const void* at, size_t bytes, uint32_t record) {
  const ptrdiff_t first = static_cast<const char*>(at) - machine.shared;
  std::fill_n(machine.shared_writes.begin() + first, bytes, record);
}

void mark_in_flight(Machine& machine, const void* at, size_t bytes) { mark(machine, at, bytes, IN_FLIGHT); }

void mark_landed(Machine& machine, const void* at, size_t bytes) {
  mark(machine, at, bytes, machine.now << WHO_BITS | machine.running->number);
}

void begin_checked_block(Machine& machine) {
  std::fill(machine.shared_writes.begin(), machine.shared_writes.end(), NEVER);
  std::fill(machine.shared_reads.begin(), machine.shared_reads.end(), NEVER);
}

void renumber_buffers(Machine& machine, uint32_t launch);

void keep_time_in_range(Machine& machine) {
  if (machine.now < LAST_TIME / 2) return;
  // All that this launch did so far becomes one time of another block; all before, the host's.
  constexpr uint32_t LAUNCH = 3;
  renumber_buffers(machine, LAUNCH);
  machine.launch_began = LAUNCH;
  machine.now = LAUNCH + 1;
}

uint32_t renumbered(const Machine& machine, uint32_t record, uint32_t launch, uint32_t older) {
  if (record <= HOST) return record;
  return record >> WHO_BITS >= machine.launch_began ? launch << WHO_BITS | (record & WHO) : older;
}

void renumber(Machine& machine, Buffer& buffer, uint32_t launch) {
  for (size_t i = 0; i < buffer.bytes; i++) {
    buffer.writes[i] = renumbered(machine, buffer.writes[i], launch, HOST);
    buffer.reads[i] = renumbered(machine, buffer.reads[i], launch, NEVER);
  }
}

#endif

}  // namespace EMU

#ifdef EMU_CHECKED
using namespace EMU;

static void instrumented(const void* at, size_t bytes, bool writes, void* code) {
  Machine* machine = this_machine;
  if (machine && machine->running) check_access(*machine, at, bytes, writes, nullptr, 0, code);
}

// What -fsanitize=thread has the compiler call.
#define HOOKS(bytes)                                                                                              \
  extern "C" void __tsan_read##bytes(void* at) { instrumented(at, bytes, false, __builtin_return_address(0)); }   \
  extern "C" void __tsan_write##bytes(void* at) { instrumented(at, bytes, true, __builtin_return_address(0)); }   \
  extern "C" void __tsan_unaligned_read##bytes(void* at) {                                                        \
    instrumented(at, bytes, false, __builtin_return_address(0));                                                  \
  }                                                                                                               \
  extern "C" void __tsan_unaligned_write##bytes(void* at) {                                                       \
    instrumented(at, bytes, true, __builtin_return_address(0));                                                   \
  }                                                                                                               \
  extern "C" void __tsan_volatile_read##bytes(void* at) {                                                         \
    instrumented(at, bytes, false, __builtin_return_address(0));                                                  \
  }                                                                                                               \
  extern "C" void __tsan_volatile_write##bytes(void* at) { instrumented(at, bytes, true, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* at, size_t bytes) { instrumented(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { instrumented(at, bytes, true, __builtin_return_address(0)); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  instrumented(from, bytes, false, __builtin_return_address(0));
  instrumented(to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* at, int value, size_t bytes) {
  instrumented(at, bytes, true, __builtin_return_address(0));
  return memset(at, value, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  instrumented(from, bytes, false, __builtin_return_address(0));
  instrumented(to, bytes, true, __builtin_return_address(0));
  return memmove(to, from, bytes);
}

// What -fsanitize=alignment,bounds,shift,signed-integer-overflow has it call, where one of them is found.
struct UbsanPlace {
  const char* file;
  uint32_t line, column;
};
struct UbsanMismatch {
  UbsanPlace place;
  void* type;
  uint8_t log_alignment, kind;
};
static void found(const UbsanPlace& place, const char* words) {
  Machine* machine = this_machine;
  if (machine && machine->running) fail(*machine, place.file, int(place.line), "%s", words);
}
void __ubsan_handle_type_mismatch_v1(UbsanMismatch* mismatch, uintptr_t) {
  found(mismatch->place, ("an address that is not " + std::to_string(1 << mismatch->log_alignment) + "-byte aligned").c_str());
}
void __ubsan_handle_out_of_bounds(UbsanPlace* place, uintptr_t) { found(*place, "an index out of an array's bounds"); }
void __ubsan_handle_shift_out_of_bounds(UbsanPlace* place, uintptr_t, uintptr_t) {
  found(*place, "a shift by more than the number's bits");
}
void __ubsan_handle_add_overflow(UbsanPlace* place, uintptr_t, uintptr_t) { found(*place, "integer overflow in +"); }
void __ubsan_handle_sub_overflow(UbsanPlace* place, uintptr_t, uintptr_t) { found(*place, "integer overflow in -"); }
void __ubsan_handle_mul_overflow(UbsanPlace* place, uintptr_t, uintptr_t) { found(*place, "integer overflow in *"); }
void __ubsan_handle_negate_overflow(UbsanPlace* place, uintptr_t) { found(*place, "integer overflow in -"); }
void __ubsan_handle_divrem_overflow(UbsanPlace* place, uintptr_t, uintptr_t) { found(*place, "integer overflow in /"); }
}
#endif
