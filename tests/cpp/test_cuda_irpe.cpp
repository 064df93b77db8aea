// Every CUDA launcher of natrpb/irpe.h against the definition (irpe_definition.h). Built with the emulator, so the kernels' own
// source runs here, also under sanitizers.
#include "far_rows.h"
#include "irpe_definition.h"

namespace {

using namespace natrpb;
using namespace natrpb::test;

struct Cuda {
  static Status rpe_index(const RpeIndexParams& p) { return cuda::rpe_index(p, nullptr); }
  static Status rpe_index_transposed(const RpeIndexParams& p) { return cuda::rpe_index_transposed(p, nullptr); }
  static int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& p) {
    return cuda::irpe_attention_backward_workspace(p);
  }
  static Status irpe_attention_forward(const IrpeAttentionParams& p) { return cuda::irpe_attention_forward(p, nullptr); }
  static Status irpe_attention_backward(const IrpeAttentionParams& p) { return cuda::irpe_attention_backward(p, nullptr); }
};

void expect_ok(const Status& status) {
  check(status.ok(), [&] { return status.message(); });
}

// All launchers on fp16 rows `stride` elements apart in `memory`: the elements of all results.
std::vector<uint16_t> results_at_stride(uint16_t* memory, int64_t stride) {
  constexpr int64_t kRows = 3, kColumns = 8;  // queries, keys; channels, buckets
  using Half = Storage<DType::kFloat16>;
  const std::vector<int32_t> map = {0, 5, 2, 7, 1, 1, 3, 0, 6};
  std::vector<float> lse(kRows);
  std::vector<char> workspace(1 << 16);
  IrpeAttentionParams p;
  p.batch = p.heads = 1;
  p.queries = p.keys = kRows;
  p.head_dim = p.value_dim = kColumns;
  p.dtype = DType::kFloat16;
  p.index_k = p.index_q = p.index_v = {map.data(), 1, kColumns};
  p.lse = {lse.data(), 0, 0, 1};
  p.workspace = workspace.data();
  RpeIndexParams lookup;
  lookup.batch = lookup.heads = 1;
  lookup.queries = lookup.keys = kRows;
  lookup.dtype = DType::kFloat16;
  lookup.index = p.index_k;
  const std::vector<RowsView*> inputs = {&p.query, &p.key, &p.value, &p.query_rows, &p.key_rows, &p.dout, &p.dbinned};
  const std::vector<RowsView*> outputs = {&p.out,         &p.binned,    &p.dquery, &p.dkey,  &p.dvalue,
                                          &p.dquery_rows, &p.dkey_rows, &lookup.x, &lookup.y};
  const auto row = [&](const RowsView& matrix, int64_t i) { return static_cast<uint16_t*>(matrix.data) + i * stride; };
  for (const auto& matrices : {inputs, outputs}) {
    for (RowsView* matrix : matrices) {
      *matrix = {memory, 0, 0, stride};
      memory += kColumns;
    }
  }
  std::mt19937 random(7);
  for (RowsView* matrix : inputs) {
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
      row(*matrix, i / kColumns)[i % kColumns] = Half::store(exact_sixteenth(random));
    }
  }
  expect_ok(Cuda::irpe_attention_forward(p));
  check(Cuda::irpe_attention_backward_workspace(p) <= static_cast<int64_t>(workspace.size()), [] { return "workspace"; });
  expect_ok(Cuda::irpe_attention_backward(p));
  const RowsView spread = lookup.y, summed = lookup.x;
  lookup.x = p.query_rows;
  expect_ok(Cuda::rpe_index(lookup));
  lookup.x = summed;
  lookup.y = spread;
  expect_ok(Cuda::rpe_index_transposed(lookup));
  std::vector<uint16_t> results;
  for (RowsView* matrix : outputs) {
    for (int64_t i = 0; i < kRows; ++i) {
      results.insert(results.end(), row(*matrix, i), row(*matrix, i) + (matrix == &lookup.y ? kRows : kColumns));
    }
  }
  return results;
}

// More channels than a slice, more buckets than a sweep has bins, tables that many blocks add to.
const std::vector<IrpeCase> kCases = {
    {"channels of several slices", 1, 1, 35, 33, 72, 136, 5, 5, 5, 5, 1, true, false},
    {"buckets of several sweeps", 1, 1, 9, 40, 8, 8, 300, 90, 250, 400, 2, false, true},
    {"several tiles of a head", 3, 2, 70, 66, 64, 64, 50, 50, 50, 50, 1, false, false},
};

}  // namespace

int main() {
  test_irpe<Cuda>();
  for (const IrpeCase& c : kCases) {
    IrpeTest<Cuda, DType::kFloat64>(c).run();
    IrpeTest<Cuda, DType::kFloat32>(c).run();
    IrpeTest<Cuda, DType::kBFloat16>(c).run();
    IrpeTest<Cuda, DType::kFloat16>(c).run();
  }
  test_offsets_beyond_32_bits(results_at_stride);
  return finish("cuda irpe");
}
