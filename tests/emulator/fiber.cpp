#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef NATRPB_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef NATRPB_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifdef __x86_64__
// void natrpb_emulator_switch(void** save, void* load): pushes the registers that a call preserves, swaps stacks, pops them.
extern "C" __attribute__((visibility("hidden"))) void natrpb_emulator_switch(void** save, void* load);
asm(R"(
.pushsection .text
.hidden natrpb_emulator_switch
.globl natrpb_emulator_switch
.type natrpb_emulator_switch, @function
natrpb_emulator_switch:
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
.size natrpb_emulator_switch, . - natrpb_emulator_switch
.popsection
)");
#endif

#ifdef NATRPB_EMULATOR_TSAN
// A second's wait at exit, for threads that might still race, is of no use to fibers.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
#endif

namespace natrpb::emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // committed page by page as used
// Stacks begin at the same offset of a page; without a stagger all lanes' frames would meet in the same cache sets.
constexpr size_t kStagger = 17 * 64;
constexpr size_t kStaggerRange = 64 * 1024;
static_assert(kStagger % 16 == 0 && kStaggerRange < kStackBytes);

#ifdef NATRPB_EMULATOR_ASAN
// The fiber that was left last: its stack's bounds become known on arrival.
const void** left_bottom = nullptr;
size_t* left_bytes = nullptr;
#endif

void* allocate_stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    std::perror("natrpb emulator: no memory for a stack");
    std::abort();
  }
  return static_cast<char*>(memory) + guard;
}

}  // namespace

Fiber::Fiber() {
#ifdef NATRPB_EMULATOR_TSAN
  tsan_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(void (*entry)(), int number) : bottom_(allocate_stack()), bytes_(kStackBytes) {
  const size_t stagger = static_cast<size_t>(number) * kStagger % kStaggerRange;
#ifdef __x86_64__
  // As if entry() had been called from address 0 and left by natrpb_emulator_switch: 6 registers, entry, return address.
  char* top = static_cast<char*>(const_cast<void*>(bottom_)) + kStackBytes - stagger;
  void** frame = reinterpret_cast<void**>(top) - 8;
  frame[6] = reinterpret_cast<void*>(entry);
  frame[7] = nullptr;
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = const_cast<void*>(bottom_);
  context_.uc_stack.ss_size = kStackBytes - stagger;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
#ifdef NATRPB_EMULATOR_TSAN
  tsan_ = __tsan_create_fiber(0);
#endif
}

void Fiber::switch_from_to(Fiber& from, Fiber& to) {
#ifdef NATRPB_EMULATOR_ASAN
  void* fake_stack = nullptr;
  left_bottom = &from.bottom_;
  left_bytes = &from.bytes_;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom_, to.bytes_);
#endif
#ifdef NATRPB_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  natrpb_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#ifdef NATRPB_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, left_bottom, left_bytes);
#endif
}

void Fiber::started() {
#ifdef NATRPB_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, left_bottom, left_bytes);
#endif
}

void Fiber::set_name([[maybe_unused]] const char* name) {
#ifdef NATRPB_EMULATOR_TSAN
  __tsan_set_fiber_name(tsan_, name);
#endif
}

void Fiber::synchronize([[maybe_unused]] Fiber* const* fibers, [[maybe_unused]] int count, [[maybe_unused]] void* address,
                        [[maybe_unused]] Fiber& running) {
#ifdef NATRPB_EMULATOR_TSAN
  for (int i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(fibers[i]->tsan_, __tsan_switch_to_fiber_no_sync);
    __tsan_release(address);
  }
  for (int i = 0; i < count; ++i) {
    __tsan_switch_to_fiber(fibers[i]->tsan_, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(address);
  }
  __tsan_switch_to_fiber(running.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
}

}  // namespace natrpb::emulator
