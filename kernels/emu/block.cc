// Fibers, and how a block's threads take turns: a thread runs until it waits for others, or returns.
#include <numeric>

#include "runtime.h"

namespace EMU {

__thread const Indices* indices;

extern "C" void EMU_EXPORT(switch_stack)(void** save, void* load);
#if defined(__x86_64__)
#define EMU_TEXT_(name) #name
#define EMU_TEXT(name) EMU_TEXT_(name)
// Saves what a call must preserve (System V ABI) on this stack, and takes it from the other.
asm(".text\n"
    ".globl " EMU_TEXT(EMU_EXPORT(switch_stack)) "\n"
    EMU_TEXT(EMU_EXPORT(switch_stack)) ":\n"
    R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED_REGISTERS = 6;
#elif defined(__aarch64__)
#error "the emulation has no stack switch for this processor yet: add one to kernels/emu/block.cc"
#endif

static void fiber();

static void* new_stack(Thread& thread) {
  void** top = static_cast<void**>(thread.stack);
  *--top = nullptr;  // the ABI's alignment at a function's first instruction
  *--top = reinterpret_cast<void*>(fiber);
  return top - SAVED_REGISTERS;
}

// The next thread of the warp that can run, in its order from `after` on.
static Thread* next_of(Warp& warp, int after) {
  const uint32_t ready = warp.runnable | warp.fresh;
  if (!ready) return nullptr;
  const uint32_t later = after >= WARP - 1 ? 0 : ready & (~0u << (after + 1));
  return warp.slots[__builtin_ctz(later ? later : ready)];
}

static void run(Machine& machine, void** save, Thread& thread) {
  const uint32_t slot = 1u << thread.slot;
  void* stack_pointer = thread.stack_pointer;
  if (thread.warp->fresh & slot) {
    thread.warp->fresh &= ~slot;
    thread.stack = machine.free_stacks.back();
    machine.free_stacks.pop_back();
    stack_pointer = new_stack(thread);
  } else {
    thread.warp->runnable &= ~slot;
  }
  machine.running = &thread;
  machine.accesses_alone = 0;
  indices = &thread.indices;
  EMU_EXPORT(switch_stack)(save, stack_pointer);
}

[[noreturn]] static void back_to_scheduler(Machine& machine) {
  void* never_again;
  EMU_EXPORT(switch_stack)(&never_again, machine.scheduler);
  __builtin_unreachable();
}

void leave_fiber(Machine& machine) { back_to_scheduler(machine); }

// Another lane of the warp goes on, or else another warp.
void wait_for_others(Machine& machine, Thread& thread) {
  if (Thread* next = next_of(*thread.warp, thread.slot)) {
    run(machine, &thread.stack_pointer, *next);
    return;
  }
  machine.running = nullptr;
  EMU_EXPORT(switch_stack)(&thread.stack_pointer, machine.scheduler);
}

static void fiber() {
  Machine& machine = *this_machine;
  for (;;) {
    machine.entry->run(machine.arguments);
    Thread& thread = *machine.running;
    if (!thread.copies.empty()) {
      const PendingCopy& copy = thread.copies.front();
      fail(machine, copy.file, copy.line, "the thread returns before it has waited for its cp.async");
    }
    Warp& warp = *thread.warp;
    warp.returned |= 1u << thread.lane;
    machine.returned++;
    if (warp.fresh && !warp.runnable) {
      // The next thread begins on this stack: a kernel that never waits never switches.
      Thread& next = *next_of(warp, thread.slot);
      warp.fresh &= ~(1u << next.slot);
      next.stack = thread.stack;
      machine.running = &next;
      machine.accesses_alone = 0;
      indices = &next.indices;
      continue;
    }
    machine.free_stacks.push_back(thread.stack);
    if (Thread* next = next_of(warp, thread.slot)) {
      void* never_again;
      run(machine, &never_again, *next);
    }
    back_to_scheduler(machine);
  }
}

void sync_threads(const char* file, int line) {
  Machine& machine = *this_machine;
  Thread& thread = *machine.running;
  thread.meeting = Meeting::Barrier;
  thread.file = file, thread.line = line;
  machine.at_barrier++;
  wait_for_others(machine, thread);
}

static void prepare(Machine& machine, uint3 block, uint3 grid, uint3 size, bool shuffled) {
  machine.free_stacks.clear();
  for (int number = machine.thread_count - 1; number >= 0; number--) {
    // Tops at different offsets, so that the fibers do not share one set of the cache.
    char* top = machine.stacks + (number + 1) * STACK_BYTES - (number % 61) * 192;
    machine.free_stacks.push_back(top);
    Thread& thread = machine.threads[number];
    const uint32_t n = number;
    thread.indices = {{n % size.x, n / size.x % size.y, n / (size.x * size.y)}, block, size, grid};
    thread.number = number;
    thread.lane = number % WARP;
    thread.warp = &machine.warps[number / WARP];
    thread.meeting = Meeting::None;
    thread.copies.clear();
    thread.copy_group = 0;
  }
  for (int number = 0; number < machine.warp_count; number++) {
    Warp& warp = machine.warps[number];
    const int lanes = std::min(WARP, machine.thread_count - WARP * number);
    int order[WARP];
    std::iota(order, order + lanes, 0);
    if (shuffled)
      for (int i = lanes - 1; i > 0; i--) std::swap(order[i], order[machine.random() % (i + 1)]);
    for (int slot = 0; slot < lanes; slot++) {
      Thread& thread = machine.threads[WARP * number + order[slot]];
      warp.slots[slot] = &thread;
      warp.slot_of[thread.lane] = slot;
      thread.slot = slot;
    }
    warp.lanes = lanes == WARP ? ~0u : (1u << lanes) - 1;
    warp.fresh = warp.lanes;
    warp.runnable = warp.arrived = warp.returned = warp.synced_at = 0;
  }
  machine.returned = machine.at_barrier = 0;
}

// All threads that have not returned are at a barrier: it must be the same one, and nobody may have returned.
static bool is_one_barrier(Machine& machine) {
  const Thread* first = nullptr;
  for (int number = 0; number < machine.thread_count; number++) {
    const Thread& thread = machine.threads[number];
    if (thread.warp->returned >> thread.lane & 1) {
      fail(machine, nullptr, 0, "divergent barrier: thread %d has returned, and others wait at a __syncthreads", number);
      return false;
    }
    if (first && (first->line != thread.line || strcmp(first->file, thread.file))) {
      fail(machine, nullptr, 0, "divergent barrier: thread %d waits at %s:%d, thread %d at %s:%d", first->number,
           first->file, first->line, number, thread.file, thread.line);
      return false;
    }
    if (!first) first = &thread;
  }
  return true;
}

static void tell_deadlock(Machine& machine) {
  for (int number = 0; number < machine.thread_count; number++) {
    const Thread& thread = machine.threads[number];
    const Warp& warp = *thread.warp;
    if (warp.arrived >> thread.lane & 1) {
      return fail(machine, thread.file, thread.line,
                  "deadlock: thread %d waits at a %s for lanes %08x, of which %08x have come (returned: %08x)", number,
                  name_of(thread.meeting), warp.mask[thread.lane], warp.arrived, warp.returned);
    }
  }
  fail(machine, nullptr, 0, "deadlock");
}

void run_block(Machine& machine, uint3 block, uint3 grid, uint3 size, bool shuffled) {
  keep_time_in_range(machine);
  machine.block_began = machine.barrier = ++machine.now;
  memset(machine.shared, POISON, machine.shared_bytes);
  begin_checked_block(machine);
  prepare(machine, block, grid, size, shuffled);
  int order[MOST_THREADS / WARP];
  std::iota(order, order + machine.warp_count, 0);
  for (;;) {
    if (shuffled)
      for (int i = machine.warp_count - 1; i > 0; i--) std::swap(order[i], order[machine.random() % (i + 1)]);
    for (int i = 0; i < machine.warp_count; i++) {
      while (Thread* thread = next_of(machine.warps[order[i]], WARP)) {
        run(machine, &machine.scheduler, *thread);
        machine.running = nullptr;
        if (machine.failed) return;
      }
    }
    if (machine.returned == machine.thread_count) return;
    if (machine.at_barrier + machine.returned != machine.thread_count) return tell_deadlock(machine);
    if (!is_one_barrier(machine)) return;
    machine.at_barrier = 0;
    machine.barrier = ++machine.now;
    for (int number = 0; number < machine.warp_count; number++) {
      Warp& warp = machine.warps[number];
      // By slot: of a warp that is not whole, the first ones.
      warp.runnable = warp.lanes;
    }
  }
}

}  // namespace EMU
