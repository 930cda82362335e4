// cp.async: a copy lands when it is waited for, or at once under some seeds. Until then its target holds poison.
#include "runtime.h"

namespace EMU {

static void land(const PendingCopy& copy) {
  memcpy(copy.to, copy.from, copy.from_bytes);
  memset(static_cast<char*>(copy.to) + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
}

void copy_async(void* to, const void* from, int bytes, int from_bytes, const char* file, int line) {
  Machine& machine = *this_machine;
  Thread& thread = *machine.running;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    fail(machine, file, line, "cp.async: an address that is not %d-byte aligned", bytes);
  }
  if (!is_shared(machine, to, bytes)) {
    fail(machine, file, line, "cp.async: a target at byte %td of %zu bytes of shared memory",
         static_cast<const char*>(to) - machine.shared, machine.shared_bytes);
  }
  if (from_bytes) check_access(machine, from, from_bytes, false, file, line, nullptr);
  check_access(machine, to, bytes, true, file, line, nullptr, true);
  const PendingCopy copy{to, from, uint8_t(bytes), uint8_t(from_bytes), thread.copy_group, file, line};
  if (machine.copies_land_at_once) {
    land(copy);
  } else {
    memset(to, POISON, bytes);
  }
  mark_in_flight(machine, to, bytes);
  thread.copies.push_back(copy);
}

void copy_commit() { this_machine->running->copy_group++; }

void copy_wait(int pending) {
  Machine& machine = *this_machine;
  Thread& thread = *machine.running;
  size_t landed = 0;
  for (const PendingCopy& copy : thread.copies) {
    if (uint16_t(thread.copy_group - copy.group) <= pending) break;
    land(copy);
    mark_landed(machine, copy.to, copy.bytes);
    landed++;
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landed);
}

void* shared_memory() { return this_machine->shared; }

}  // namespace EMU
