// The CPU launchers of l2_normalize against the definition. CTest runs this once for each instruction set (NATRPB_ISA).
#include <thread>

#include "cpu/isa.h"
#include "l2_normalize_definition.h"

namespace {

using namespace natrpb;

void on_two_threads(int64_t count, void* body, void (*call)(void*, int64_t, int64_t)) {
  std::thread other([&] { call(body, count / 2, count); });
  call(body, 0, count / 2);
  other.join();
}

struct Cpu {
  static int64_t l2_normalize_backward_workspace(const L2NormalizeParams& p) { return cpu::l2_normalize_backward_workspace(p); }
  static Status l2_normalize(const L2NormalizeParams& p) { return cpu::l2_normalize(p, on_two_threads); }
  static Status l2_normalize_backward(const L2NormalizeParams& p) { return cpu::l2_normalize_backward(p, on_two_threads); }
};

}  // namespace

int main() {
  test::test_l2_normalize<Cpu>();
  return test::finish(cpu::isa_name(cpu::active_isa()));
}
