// Stacks that hand control to each other, and what the sanitizers must hear about it.
//
// NB: these sources are compiled without sanitizers, whatever the kernels are compiled with: ThreadSanitizer would take the
// emulator's own bookkeeping, which all fibers share, for races of the kernel. NATRPB_EMULATOR_ASAN and NATRPB_EMULATOR_TSAN
// say what the program is linked with.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_THREAD__
#error "compile the emulator's own sources without -fsanitize=thread and with -DNATRPB_EMULATOR_TSAN"
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace natrpb::emulator {

#ifdef NATRPB_EMULATOR_TSAN
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

class Fiber {
 public:
  // The stack of whoever runs now.
  Fiber();
  // A stack of its own, on which entry() starts when first switched to; `number` staggers the stacks in the caches. Is never
  // given back.
  Fiber(void (*entry)(), int number);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Saves the running fiber `from` and continues `to`. Orders no memory between them.
  static void switch_from_to(Fiber& from, Fiber& to);
  // What entry() calls first.
  static void started();
  void set_name(const char* name);

  // Everything that the fibers did so far happens before everything that they do from now on. `address` stands for the group:
  // of two groups with one address the later one must hold a fiber of the earlier.
  static void synchronize(Fiber* const* fibers, int count, void* address, Fiber& running);

 private:
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* tsan_ = nullptr;
};

}  // namespace natrpb::emulator
