// Device memory: buffers between pages that fault, and the faults as messages.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "runtime.h"

namespace EMU {

static std::mutex buffers_lock;
static std::map<uintptr_t, Buffer*> buffers;  // by their first byte

static size_t up_to(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

Buffer* buffer_at(Machine& machine, const void* pointer) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  Buffer* last = machine.last_buffer;
  if (last && at - reinterpret_cast<uintptr_t>(last->base) < last->bytes) return last;
  std::lock_guard<std::mutex> lock(buffers_lock);
  auto behind = buffers.upper_bound(at);
  if (behind == buffers.begin()) return nullptr;
  Buffer* buffer = std::prev(behind)->second;
  if (at - reinterpret_cast<uintptr_t>(buffer->base) >= buffer->bytes) return nullptr;
  return machine.last_buffer = buffer;
}

std::string nearest_buffer(const void* pointer) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  std::lock_guard<std::mutex> lock(buffers_lock);
  std::string nearest = "no buffer is near";
  uintptr_t least = ~uintptr_t(0);
  for (const auto& [base, buffer] : buffers) {
    const uintptr_t end = base + buffer->bytes;
    const uintptr_t distance = at < base ? base - at : at - end;
    if (distance >= least) continue;
    least = distance;
    char words[300];
    snprintf(words, sizeof words, "%zu bytes %s '%s' of %zu bytes", size_t(distance), at < base ? "before" : "behind",
             buffer->name.c_str(), buffer->bytes);
    nearest = words;
  }
  return nearest;
}

// Between a buffer's end and its guard page there may be a few bytes.
bool touched_behind_a_buffer(std::string& message) {
  std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [base, buffer] : buffers) {
    for (char* at = buffer->base + buffer->bytes; reinterpret_cast<uintptr_t>(at) % 16; at++) {
      if (*at == char(POISON)) continue;
      *at = char(POISON);
      message = "a write behind the end of '" + buffer->name + "'";
      return true;
    }
  }
  return false;
}

#ifdef EMU_CHECKED
void renumber(Machine& machine, Buffer& buffer, uint32_t launch);
void renumber_buffers(Machine& machine, uint32_t launch) {
  std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [_, buffer] : buffers) renumber(machine, *buffer, launch);
}
#endif

static void leave_with_fault();

// Who handled faults before: the other build, or the program.
static struct sigaction before_segv, before_bus;

static void on_fault(int signal_number, siginfo_t* info, void* raw) {
  Machine* machine = this_machine;
  if (!machine || !machine->running) {
    const struct sigaction& before = signal_number == SIGSEGV ? before_segv : before_bus;
    if (before.sa_flags & SA_SIGINFO) {
      before.sa_sigaction(signal_number, info, raw);
    } else {
      signal(signal_number, SIG_DFL);
    }
    return;
  }
  const char* at = static_cast<const char*>(info->si_addr);
  const bool is_stack = size_t(at - machine->stacks) < MOST_THREADS * STACK_BYTES;
  const bool is_arena = size_t(at - machine->arena) < 2 * ARENA_BYTES;
  auto& registers = static_cast<ucontext_t*>(raw)->uc_mcontext.gregs;
  const std::string code = source_of(reinterpret_cast<void*>(registers[REG_RIP] + 1));
  char words[700];
  if (is_stack) {
    snprintf(words, sizeof words, "a thread needs more than %zu bytes of stack, at %s", STACK_BYTES, code.c_str());
  } else if (is_arena) {
    snprintf(words, sizeof words, "byte %td of %zu bytes of shared memory is touched at %s", at - machine->shared,
             machine->shared_bytes, code.c_str());
  } else {
    snprintf(words, sizeof words, "memory that is not there is touched (%s) at %s", nearest_buffer(at).c_str(),
             code.c_str());
  }
  machine->error = words;
  // The handler returns to a function on a stack that has room, which ends the launch.
  auto& stack_pointer = registers[REG_RSP];
  if (is_stack) stack_pointer = reinterpret_cast<greg_t>(machine->stacks + MOST_THREADS * STACK_BYTES);
  stack_pointer = ((stack_pointer - 256) & ~greg_t(15)) - 8;
  registers[REG_RIP] = reinterpret_cast<greg_t>(leave_with_fault);
}

static void leave_with_fault() {
  Machine& machine = *this_machine;
  const std::string words = machine.error;
  fail(machine, nullptr, 0, "%s", words.c_str());
}

void catch_faults() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
  });
}

}  // namespace EMU
using namespace EMU;

static void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

extern "C" void* EMU_EXPORT(allocate)(size_t bytes, const char* name, bool sparse) {
  const size_t inner = up_to(std::max<size_t>(bytes, 1), PAGE_BYTES), mapped_bytes = inner + 2 * PAGE_BYTES;
  char* mapped = static_cast<char*>(reserve(mapped_bytes));
  if (!mapped) return nullptr;
  mprotect(mapped, PAGE_BYTES, PROT_NONE);
  mprotect(mapped + PAGE_BYTES + inner, PAGE_BYTES, PROT_NONE);
  auto* buffer = new Buffer;
  buffer->base = mapped + PAGE_BYTES + inner - up_to(bytes, 16);
  buffer->bytes = bytes;
  buffer->mapped = mapped, buffer->mapped_bytes = mapped_bytes;
  buffer->name = name;
  if (sparse) {
    memset(buffer->base + bytes, POISON, up_to(bytes, 16) - bytes);
  } else {
    memset(buffer->base, POISON, up_to(bytes, 16));
  }
  if (CHECKED) {
    buffer->writes = static_cast<uint32_t*>(reserve(4 * bytes + 4));
    buffer->reads = static_cast<uint32_t*>(reserve(4 * bytes + 4));
  }
  std::lock_guard<std::mutex> lock(buffers_lock);
  buffers[reinterpret_cast<uintptr_t>(buffer->base)] = buffer;
  return buffer->base;
}

extern "C" void EMU_EXPORT(release)(void* memory) {
  std::lock_guard<std::mutex> lock(buffers_lock);
  auto found = buffers.find(reinterpret_cast<uintptr_t>(memory));
  if (found == buffers.end()) return;
  Buffer* buffer = found->second;
  buffers.erase(found);
  if (this_machine) this_machine->last_buffer = nullptr;
  munmap(buffer->mapped, buffer->mapped_bytes);
  if (CHECKED) {
    munmap(buffer->writes, 4 * buffer->bytes + 4);
    munmap(buffer->reads, 4 * buffer->bytes + 4);
  }
  delete buffer;
}

extern "C" void EMU_EXPORT(written)(void* at, size_t bytes) {
  Buffer* buffer = CHECKED ? buffer_at(machine(), at) : nullptr;
  if (!buffer) return;
  const size_t first = static_cast<char*>(at) - buffer->base;
  std::fill(buffer->writes + first, buffer->writes + first + bytes, 1u);
}

extern "C" size_t EMU_EXPORT(unwritten)(const void* at, size_t bytes) {
  Buffer* buffer = CHECKED ? buffer_at(machine(), at) : nullptr;
  if (!buffer) return 0;
  const size_t first = static_cast<const char*>(at) - buffer->base;
  return std::count(buffer->writes + first, buffer->writes + first + bytes, 0u);
}

extern "C" bool EMU_EXPORT(holds)(const void* at, size_t bytes) {
  Buffer* buffer = buffer_at(machine(), at);
  return buffer && size_t(static_cast<const char*>(at) - buffer->base) + bytes <= buffer->bytes;
}
