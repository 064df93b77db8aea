// The tensor-core kernels of local attention, at the shapes where their tilings change: maps smaller and larger than a tile,
// ragged ends, more columns than registers hold, tiles that stream through shared memory, and numbers that are not finite.
// Built with the emulator, so the kernels' own source runs here, also under sanitizers.
#include <algorithm>
#include <cstdlib>

#include "emulator.h"
#include "local_attention_cuda.h"

namespace {

using namespace natrpb;
using namespace natrpb::test;

const Axis kOne = neighborhood(1, 1);

std::vector<Case> small_cases() {
  return {
      {"K = 7, L = K", {kOne, neighborhood(7, 7), neighborhood(7, 7)}, 2, 2, 32, 32, true},
      {"K = 7, L = 2K - 1 and 2K", {kOne, neighborhood(13, 7), neighborhood(14, 7)}, 1, 2, 32, 32, true},
      {"K = 7, interior tiles", {kOne, neighborhood(18, 7), neighborhood(21, 7)}, 2, 1, 32, 32, true},
      {"K = 7, no bias", {kOne, neighborhood(11, 7), neighborhood(9, 7)}, 1, 2, 32, 32, false},
      {"K = 7, 24 channels", {kOne, neighborhood(9, 7), neighborhood(23, 7)}, 1, 1, 24, 24, true},
      {"K = 7, 8 and 16 channels", {kOne, neighborhood(9, 7), neighborhood(11, 7)}, 1, 2, 8, 16, true},
      {"K = 7, 64 channels", {kOne, neighborhood(8, 7), neighborhood(13, 7)}, 1, 1, 64, 64, true},
      {"K = 5, 128 channels", {kOne, neighborhood(10, 5), neighborhood(9, 5)}, 1, 1, 128, 128, true},
      {"windows, shifted", {kOne, window(14, 7, 3), window(21, 7, 3)}, 1, 2, 32, 32, true},
      {"windows, cut", {kOne, window(15, 7, 2), window(16, 7, 5)}, 1, 1, 32, 32, true},
      {"windows of 12", {kOne, window(24, 12, 6), window(13, 12, 0)}, 1, 1, 32, 32, true},
      {"windows, 3-D", {window(5, 4, 2), window(7, 3, 1), window(9, 4, 2)}, 1, 1, 32, 32, true},
      {"dilated, ragged groups", {kOne, neighborhood(11, 3, 1, 2), neighborhood(17, 3, 1, 3)}, 1, 2, 32, 32, true},
      {"dilation of 28", {kOne, neighborhood(57, 2, 1, 28), neighborhood(3, 3)}, 1, 1, 32, 32, true},
      {"strided", {kOne, neighborhood(13, 5, 3), neighborhood(14, 4, 2)}, 1, 2, 32, 32, true},
      {"strided, 1-D", {kOne, kOne, neighborhood(113, 6, 5)}, 1, 2, 32, 32, true},
      {"causal, strided", {kOne, causal(13, 5, 2), causal(21, 4, 1)}, 1, 2, 32, 32, true},
      {"causal, 1-D", {kOne, kOne, causal(90, 40, 1)}, 1, 1, 64, 64, true},
      {"3-D", {neighborhood(5, 3), neighborhood(6, 3), neighborhood(9, 3)}, 2, 1, 32, 32, true},
      {"empty batch", {kOne, neighborhood(12, 7), neighborhood(12, 7)}, 0, 2, 32, 32, true},
  };
}

// More columns than a chunk of registers holds, and than shared memory holds.
std::vector<Case> wide_cases() {
  return {
      {"K = 13", {kOne, neighborhood(15, 13), neighborhood(18, 13)}, 1, 1, 32, 32, true},
      {"K = 9, 128 channels", {kOne, neighborhood(12, 9), neighborhood(13, 9)}, 1, 1, 128, 128, true},
      {"K = 5, 3-D", {neighborhood(5, 5), neighborhood(6, 5), neighborhood(7, 5)}, 1, 1, 16, 16, true},
      {"K = 127, 1-D", {kOne, kOne, neighborhood(140, 127)}, 1, 1, 32, 32, true},
      {"streamed", {kOne, kOne, causal(900, 880)}, 1, 1, 128, 128, true},
  };
}

constexpr DType kStorage = DType::kBFloat16;
using Bf16 = Storage<kStorage>;

// One call with a bias and all gradients on a batch entry and head, its tensors filled afresh from the same seed.
struct Call {
  Case c;
  Buffer<kStorage> query{c, c.head_dim, Layout::kHeadsLast}, key{query}, value{query}, dout{query}, out{query}, dquery{query},
      dkey{query}, dvalue{query};
  Buffer<DType::kFloat32> lse{c, 1, Layout::kHeadsLast};
  std::vector<float> rpb = std::vector<float>(c.table(), 0.5f), drpb = std::vector<float>(c.table(), NAN);
  LocalAttentionParams params;

  explicit Call(const Case& c_) : c(c_) {
    std::mt19937 random(7);
    for (Buffer<kStorage>* t : {&query, &key, &value, &dout, &out, &dquery, &dkey, &dvalue}) {
      t->view.data = t->data.data();  // the copies above look at the first one's numbers
      t->randomize(c, random);
    }
    for (int a = 0; a < kAxes; ++a) params.axis[a] = c.axis[a];
    params.batch = params.heads = 1;
    params.head_dim = params.value_dim = c.head_dim;
    params.dtype = kStorage;
    params.scale = 0.25;
    params.query = query.view;
    params.key = key.view;
    params.value = value.view;
    params.rpb = rpb.data();
    params.out = out.view;
    params.lse = lse.view;
    params.dout = dout.view;
    params.dquery = dquery.view;
    params.dkey = dkey.view;
    params.dvalue = dvalue.view;
    params.drpb = drpb.data();
  }

  void run() {
    const auto run = [&](int64_t bytes, Status (*launch)(const LocalAttentionParams&)) {
      std::vector<char> memory(bytes, '\xff');
      params.workspace = memory.data();
      const Status status = launch(params);
      check(status.ok(), [&] { return status.message(); });
    };
    run(Cuda::local_attention_forward_workspace(params), Cuda::local_attention_forward);
    run(Cuda::local_attention_backward_workspace(params), Cuda::local_attention_backward);
  }
};

bool sees(const Case& c, const int64_t* query, const int64_t* key) {
  bool found = false;
  each_key(c, query, [&](const int64_t* k, int64_t, int64_t) { found |= std::equal(k, k + kAxes, key); });
  return found;
}

// A number that is not finite in one channel of one position reaches all that depends on it and nothing else.
void test_poison(const Case& c, Buffer<kStorage> Call::* where, double poison) {
  const int64_t at[kAxes] = {c.axis[0].length / 2, c.axis[1].length / 3, c.axis[2].length / 2};
  const bool is_query = where == &Call::query || where == &Call::dout;
  Call call(c);
  Buffer<kStorage>& poisoned = call.*where;
  const float wide = static_cast<float>(poison);
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  poisoned.data[poisoned.view.offset(0, 0, at) + 5] = static_cast<uint16_t>(bits >> 16);
  call.run();

  const auto finite = [&](const Buffer<kStorage>& t, const int64_t* p) {
    bool all = true;
    for (int64_t d = 0; d < t.channels; ++d) all = all && std::isfinite(t(0, 0, p, d));
    return all;
  };
  std::vector<bool> entry_depends(c.table(), false);
  std::vector<bool> key_depends(c.positions(), false);
  const auto flat = [&](const int64_t* p) { return (p[0] * c.axis[1].length + p[1]) * c.axis[2].length + p[2]; };
  each_position(c, [&](const int64_t* q) {
    const bool depends = is_query ? std::equal(q, q + kAxes, at) : sees(c, q, at);
    if (depends) {
      each_key(c, q, [&](const int64_t* k, int64_t, int64_t entry) { entry_depends[entry] = key_depends[flat(k)] = true; });
      return;
    }
    check(finite(call.out, q) && finite(call.dquery, q), [&] { return std::string(c.name) + ": a query that sees no poison"; });
  });
  each_position(c, [&](const int64_t* k) {
    if (key_depends[flat(k)]) return;
    check(finite(call.dkey, k) && finite(call.dvalue, k),
          [&] { return std::string(c.name) + ": a key apart from the poison"; });
  });
  for (int64_t i = 0; i < c.table(); ++i) {
    check(entry_depends[i] || std::isfinite(call.drpb[i]),
          [&] { return std::string(c.name) + ": an entry apart from the poison"; });
  }
  if (std::isnan(poison) && (where == &Call::key || where == &Call::value)) {
    check(!finite(call.out, at), [&] { return std::string(c.name) + ": the poison itself"; });
  }
}

void test_poisons() {
  const std::vector<Case> cases = {
      {"poisoned K = 7", {kOne, neighborhood(13, 7), neighborhood(16, 7)}, 1, 1, 32, 32, true},
      {"poisoned K = 9", {kOne, neighborhood(11, 9), neighborhood(13, 9)}, 1, 1, 32, 32, true},
      {"poisoned windows", {kOne, window(9, 4, 1), window(11, 4, 3)}, 1, 1, 32, 32, true},
  };
  for (const Case& c : cases) {
    for (double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      for (Buffer<kStorage> Call::* where : {&Call::query, &Call::key, &Call::value, &Call::dout})
        test_poison(c, where, poison);
    }
  }
}

// More maps than the query pass starts CTAs for: each takes several, one after the other, in the same shared memory.
std::vector<Case> many_maps() { return {{"many maps", {kOne, kOne, neighborhood(32, 3)}, 400, 2, 8, 8, true}}; }

// The shapes above are served by the kernels under test, and interior tiles read shared memory without bank conflicts.
void test_counters() {
  emulator::reset_counters();
  Call({"interior", {kOne, neighborhood(40, 7), neighborhood(40, 7)}, 1, 1, 32, 32, true}).run();
  int kernels = 0;
  for (const emulator::Counters& counters : emulator::counters()) {
    for (const char* name : {"forward_kernel", "query_kernel", "key_kernel"}) {
      if (counters.kernel.find(name) == std::string::npos) continue;
      ++kernels;
      check(counters.ldmatrix_conflicts * 8 < counters.ldmatrix_wavefronts, [&] {
        return counters.kernel + ": " + std::to_string(counters.ldmatrix_conflicts) + " conflicts of " +
               std::to_string(counters.ldmatrix_wavefronts);
      });
    }
  }
  check(kernels == 3, [&] { return "tensor-core kernels that ran: " + std::to_string(kernels) + ", expected 3"; });
}

}  // namespace

int main() {
  // Blocks of as many warps as a case fills, then of few, as where a large device would else idle; then a device of less shared
  // memory.
  test_dtype<Cuda, DType::kBFloat16>(small_cases(), {Layout::kHeadsLast});
  setenv("NATRPB_EMULATOR_MULTIPROCESSORS", "132", 1);
  test_dtype<Cuda, DType::kFloat16>(small_cases(), {Layout::kPacked});
  unsetenv("NATRPB_EMULATOR_MULTIPROCESSORS");
  setenv("NATRPB_EMULATOR_SHARED", "101376", 1);
  test_dtype<Cuda, DType::kBFloat16>(wide_cases(), {Layout::kHeadsLast});
  unsetenv("NATRPB_EMULATOR_SHARED");
  test_dtype<Cuda, DType::kBFloat16>(many_maps(), {Layout::kHeadsLast});
  test_poisons();
  test_counters();
  return finish("cuda tensor cores");
}
