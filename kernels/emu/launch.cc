// A launch: the blocks of a grid one after the other, in an order that the seed decides.
#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>

#include "runtime.h"

namespace EMU {

void leave_fiber(Machine& machine);

thread_local Machine* this_machine;
static thread_local std::string last_error;

static void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

// Gives a machine back when its OS thread ends.
struct Owner {
  ~Owner() {
    Machine* machine = this_machine;
    if (!machine) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    stack_t current{};
    sigaltstack(nullptr, &current);
    if (current.ss_sp == machine->signal_stack) sigaltstack(&none, nullptr);
    munmap(machine->stacks, MOST_THREADS * STACK_BYTES);
    munmap(machine->arena, 2 * ARENA_BYTES);
    free(machine->signal_stack);
    delete machine;
    this_machine = nullptr;
  }
};

Machine& machine() {
  static thread_local Owner owner;
  if (!this_machine) {
    auto* machine = new Machine;
    machine->stacks = static_cast<char*>(reserve(MOST_THREADS * STACK_BYTES));
    // A stack that overflows faults.
    for (int i = 0; i < MOST_THREADS; i++) mprotect(machine->stacks + i * STACK_BYTES, PAGE_BYTES, PROT_NONE);
    machine->arena = static_cast<char*>(reserve(2 * ARENA_BYTES));
    mprotect(machine->arena + ARENA_BYTES, ARENA_BYTES, PROT_NONE);
    constexpr size_t SIGNAL_STACK_BYTES = 64 << 10;
    stack_t signals{};
    signals.ss_sp = machine->signal_stack = malloc(SIGNAL_STACK_BYTES);
    signals.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&signals, nullptr);
    this_machine = machine;
    (void)&owner;
  }
  return *this_machine;
}

void fail(Machine& machine, const char* file, int line, const char* format, ...) {
  char words[900];
  va_list rest;
  va_start(rest, format);
  int length = vsnprintf(words, sizeof words, format, rest);
  va_end(rest);
  machine.error = std::string(machine.entry ? machine.entry->name : "?") + ": " + std::string(words, std::min<int>(length, sizeof words - 1));
  if (const Thread* thread = machine.running) {
    const uint3 block = thread->indices.block;
    snprintf(words, sizeof words, " [block %u,%u,%u, thread %u]", block.x, block.y, block.z, thread->number);
    machine.error += words;
  }
  if (file) machine.error += std::string(" at ") + file + ":" + std::to_string(line);
  machine.failed = true;
  if (machine.running) leave_fiber(machine);
}

static bool refuse(std::string words) {
  last_error = std::move(words);
  return false;
}

static bool is_launchable(const Entry& entry, const EMU_EXPORT(launch_config) & config) {
  const std::string name = entry.name;
  const uint64_t threads = uint64_t(config.block[0]) * config.block[1] * config.block[2];
  if (!threads || threads > MOST_THREADS) {
    return refuse(name + ": a block of " + std::to_string(threads) + " threads; 1 to 1024 are allowed");
  }
  if (!config.grid[0] || !config.grid[1] || !config.grid[2] || config.grid[0] > 0x7fffffffu || config.grid[1] > 65535 ||
      config.grid[2] > 65535) {
    return refuse(name + ": a grid of " + std::to_string(config.grid[0]) + " × " + std::to_string(config.grid[1]) +
                  " × " + std::to_string(config.grid[2]) + " blocks");
  }
  if (config.shared_bytes > config.shared_limit || config.shared_bytes > ARENA_BYTES) {
    return refuse(name + ": " + std::to_string(config.shared_bytes) + " bytes of shared memory; this card gives a block " +
                  std::to_string(config.shared_limit));
  }
  return true;
}

static void set_up(Machine& machine, const Entry& entry, const EMU_EXPORT(launch_config) & config, void** arguments) {
  machine.entry = &entry;
  machine.arguments = arguments;
  machine.failed = false;
  machine.running = nullptr;
  machine.error.clear();
  machine.thread_count = config.block[0] * config.block[1] * config.block[2];
  machine.warp_count = (machine.thread_count + WARP - 1) / WARP;
  machine.shared_bytes = config.shared_bytes;
  machine.shared = machine.arena + ARENA_BYTES - (size_t(config.shared_bytes) + 127) / 128 * 128;
  if (CHECKED) {
    machine.shared_writes.resize(config.shared_bytes);
    machine.shared_reads.resize(config.shared_bytes);
  }
  machine.random_state = config.seed * 0x9e3779b97f4a7c15ull | 1;
  // Of the seeds, every second one.
  machine.copies_land_at_once = config.seed > 1 && config.seed % 2;
}

static void run_blocks(Machine& machine, const EMU_EXPORT(launch_config) & config) {
  const uint3 grid{config.grid[0], config.grid[1], config.grid[2]};
  const uint3 size{config.block[0], config.block[1], config.block[2]};
  const uint64_t all = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t first = std::min(config.first_block, all), blocks = std::min(config.blocks, all - first);
  // A step that has no divisor in common with the number of blocks visits each once.
  uint64_t at = config.seed && blocks ? machine.random() % blocks : 0, step = 1;
  if (config.seed && blocks > 2) {
    do step = machine.random() % (blocks - 1) + 1;
    while (std::gcd(step, blocks) != 1);
  }
  for (uint64_t i = 0; i < blocks && !machine.failed; i++, at = (at + step) % blocks) {
    const uint64_t block = first + at;
    run_block(machine,
              {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)}, grid,
              size, config.seed != 0);
  }
}

}  // namespace EMU
using namespace EMU;

extern "C" int EMU_EXPORT(launch)(const Entry* entry, const EMU_EXPORT(launch_config) * config, void** arguments) {
  if (!is_launchable(*entry, *config)) return -1;
  Machine& machine = EMU::machine();
  catch_faults();
  set_up(machine, *entry, *config, arguments);
  // The checked build has one clock for all OS threads, and one launch at a time: so a buffer's history makes sense whoever launches.
  static std::mutex turn;
  static uint32_t clock = 2;
  std::unique_lock<std::mutex> lock(turn, std::defer_lock);
  if (CHECKED) {
    lock.lock();
    machine.now = clock;
  }
  machine.launch_began = ++machine.now;
  run_blocks(machine, *config);
  indices = nullptr;
  machine.running = nullptr;
  std::string touched;
  if (!machine.failed && touched_behind_a_buffer(touched)) fail(machine, nullptr, 0, "%s", touched.c_str());
  if (CHECKED) clock = machine.now;
  last_error = machine.error;
  return machine.failed ? -1 : 0;
}

extern "C" const char* EMU_EXPORT(error)() { return last_error.c_str(); }

extern "C" EMU_EXPORT(statistics) EMU_EXPORT(take_statistics)() {
  return std::exchange(machine().statistics, {});
}

extern "C" uint32_t EMU_EXPORT(argument_count)(const Entry* entry) { return entry->arguments; }

extern "C" uint32_t EMU_EXPORT(argument_size)(const Entry* entry, uint32_t index) {
  return index < entry->arguments ? entry->sizes[index] : 0;
}
