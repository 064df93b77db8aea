// Dispatch of the tensor-core kernels: tilings, workspace, widths.
//
// A head size takes the kernels of the next width among 16, 32, 64 and 128; the channels beyond it are zeros in shared memory
// and cost products, but no traffic.

#include "cuda/local_attention_mma.h"

#include <algorithm>

#include "cuda/local_attention_mma_kernels.h"
#include "cuda/local_attention_mma_prepare.cuh"
#include "cuda/local_attention_rows_launch.cuh"

namespace natrpb::cuda::mma {

namespace {

constexpr int64_t kMostDim = 128;
constexpr int64_t kMostCtas = (int64_t{1} << 31) - 1;
constexpr int64_t kMostFragmentBytes = 64 << 20;
constexpr double kLeastScale = 1e-6, kMostScale = 1e6;  // bias / scale must neither overflow nor vanish

// CTAs of the query pass, two waves of three per multiprocessor of a large GPU, and what their tables and sums may take. A
// number of the shapes and the kind of device alone: it decides the order of sums.
constexpr int64_t kQueryCtas = 792;
constexpr int64_t kMostTableBytes = 16 << 20;
constexpr int64_t kMostSumsBytes = 64 << 20;

int width_of(const LocalAttentionParams& params) {
  const int64_t channels = max_of(params.head_dim, params.value_dim);
  return channels <= 16 ? 16 : channels <= 32 ? 32 : channels <= 64 ? 64 : 128;
}

// Multiprocessors hold 64 Ki registers; see the kernels' launch bounds.
TilingLimits limits_for(const LocalAttentionParams& params) {
  const DeviceLimits device = device_limits();
  TilingLimits limits;
  limits.block_bytes = device.block_shared_bytes;
  limits.multiprocessor_bytes = device.multiprocessor_shared_bytes;
  limits.multiprocessors = device.multiprocessors;
  limits.multiprocessor_warps = width_of(params) <= 32 ? 12 : 8;
  limits.most_tiles = kMaxCtaTiles;
  limits.bytes_per_cta = sizeof(CtaState);
  return limits;
}

Tiling forward_tiling(const LocalAttentionParams& params) {
  return make_tiling(params, false, width_of(params), limits_for(params));
}
// With the sums of dscores in shared memory, or not.
Tiling query_tiling(const LocalAttentionParams& params, bool sums_in_shared) {
  TilingLimits limits = limits_for(params);
  limits.most_tiles = kMaxWarps;
  limits.bytes_per_warp = sizeof(WarpState);
  if (sums_in_shared) limits.bytes_per_pair = kPairFloat4 * sizeof(float4);
  return make_tiling(params, false, width_of(params), limits);
}
Tiling query_tiling(const LocalAttentionParams& params) {
  Tiling tiling = query_tiling(params, params.drpb != nullptr);
  tiling.sums_in_shared = params.drpb != nullptr;
  if (params.drpb && (tiling.streamed || tiling.warps < kMaxWarps)) {
    const Tiling other = query_tiling(params, false);
    if (tiling.streamed || other.warps > tiling.warps) return other;
  }
  return tiling;
}
Tiling key_tiling(const LocalAttentionParams& params) {
  TilingLimits limits = limits_for(params);
  limits.bytes_per_warp = kChunkPairs * kPairColumns * sizeof(float2);
  return make_tiling(params, true, width_of(params), limits);
}

// Deals out a workspace; with a null start it only counts.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    char* at = start_ ? start_ + bytes_ : nullptr;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* start_;
  int64_t bytes_ = 0;
};

int64_t fragment_heads(const LocalAttentionParams& params) { return params.rpb ? params.heads : 1; }

// Tables of a tiling, and the parameters of the kernels that read them.
// Gives the kernel a tensor, of a 16-bit type unless `element_bytes` says otherwise.
void set_tensor(Params& p, int index, const View& view, int64_t element_bytes = 2) {
  Tensor& tensor = p.tensor[index];
  tensor.data = static_cast<unsigned char*>(view.data);
  Strides& bytes = tensor.bytes;
  bytes.batch = view.batch * element_bytes;
  bytes.head = view.head * element_bytes;
  for (int a = 0; a < kAxes; ++a) {
    bytes.group[a] = view.space[a] * element_bytes;
    bytes.step[a] = bytes.group[a] * p.op.axis[a].dilation;
    bytes.eight += bytes.step[a] * p.tiling.axis[a].step_of(8);
  }
}

Params make_params(const LocalAttentionParams& params, const Tiling& tiling, Arena& arena) {
  Params p;
  p.op = params;
  p.tiling = tiling;
  p.spans = arena.take<TileSpan>(tiling.spans);
  p.halos = arena.take<HaloSpan>(tiling.halos);
  p.fragments = arena.take<float4>(tiling.fragments(fragment_heads(params)));
  p.columns = arena.take<uint32_t>(tiling.column_words());
  p.fragments_per_head = params.rpb ? tiling.fragments(1) : 0;
  return p;
}

Status prepare(const Params& p, void* stream) {
  Preparation preparation;
  preparation.tiling = p.tiling;
  preparation.rpb = static_cast<const float*>(p.op.rpb);
  preparation.heads = fragment_heads(p.op);
  preparation.scale = static_cast<float>(p.op.scale);
  preparation.spans = const_cast<TileSpan*>(p.spans);
  preparation.halos = const_cast<HaloSpan*>(p.halos);
  preparation.fragments = const_cast<float4*>(p.fragments);
  preparation.columns = const_cast<uint32_t*>(p.columns);
  constexpr int64_t kMostCtas = 4096;  // each finds its class anew
  const Tiling& tiling = p.tiling;
  const int64_t parts = ceil_div(preparation.heads * tiling.pairs * kPairFloat4, kPrepareThreads);
  preparation.parts = static_cast<int32_t>(min_of(parts, max_of(kMostCtas / tiling.classes, 1)));
  const int64_t ctas = int64_t{tiling.classes} * preparation.parts + ceil_div(tiling.spans + tiling.halos, kPrepareThreads);
  return launch(prepare_kernel, dim3(static_cast<unsigned>(ctas)), kPrepareThreads, sizeof(ClassTile), stream, preparation);
}

// Statistics of every query, [B, h, *].
View stats_view(const LocalAttentionParams& params, float2* stats) {
  View view;
  view.data = stats;
  int64_t stride = 1;
  for (int a = kAxes - 1; a >= 0; --a) {
    view.space[a] = stride;
    stride *= params.axis[a].length;
  }
  view.head = stride;
  view.batch = stride * params.heads;
  return view;
}

struct Backward {
  Params query, key;
  TablePlan tables;  // of drpb
};

void set_backward_tensors(Backward& b, const LocalAttentionParams& params) {
  const View stats = stats_view(params, b.query.stats);
  set_tensor(b.query, query_tensor::kKey, params.key);
  set_tensor(b.query, query_tensor::kValue, params.value);
  set_tensor(b.query, query_tensor::kQuery, params.query);
  set_tensor(b.query, query_tensor::kDout, params.dout);
  set_tensor(b.query, query_tensor::kOut, params.out);
  set_tensor(b.query, query_tensor::kLse, params.lse, sizeof(float));
  set_tensor(b.query, query_tensor::kDlse, params.dlse, sizeof(float));
  set_tensor(b.query, query_tensor::kDquery, params.dquery);
  set_tensor(b.query, query_tensor::kStats, stats, sizeof(float2));
  set_tensor(b.key, key_tensor::kQuery, params.query);
  set_tensor(b.key, key_tensor::kDout, params.dout);
  set_tensor(b.key, key_tensor::kKey, params.key);
  set_tensor(b.key, key_tensor::kValue, params.value);
  set_tensor(b.key, key_tensor::kDkey, params.dkey);
  set_tensor(b.key, key_tensor::kDvalue, params.dvalue);
  set_tensor(b.key, key_tensor::kStats, stats, sizeof(float2));
}

Backward make_backward(const LocalAttentionParams& params, Arena& arena) {
  Backward b;
  b.query = make_params(params, query_tiling(params), arena);
  b.key = make_params(params, key_tiling(params), arena);
  Params& p = b.query;
  const int64_t positions = params.batch * params.heads * positions_of(params);
  p.stats = b.key.stats = arena.take<float2>(positions);
  set_backward_tensors(b, params);
  p.entries = static_cast<int32_t>(table_entries(params));
  const int64_t sums = p.tiling.pairs * kPairFloat4 * static_cast<int64_t>(sizeof(float4));  // of a warp
  const int64_t warps = params.heads * p.tiling.warps;                                       // of one run of every head
  int64_t runs = max_of(kQueryCtas / max_of(params.heads, 1), 1);
  if (params.drpb) {
    runs = min_of(runs, kMostTableBytes / (warps * p.entries * static_cast<int64_t>(sizeof(float))));
    if (!p.tiling.sums_in_shared) runs = min_of(runs, kMostSumsBytes / (warps * sums));
  }
  p.runs = static_cast<int32_t>(min_of(max_of(runs, 1), p.tiling.ctas * params.batch));
  if (params.drpb) {
    p.sums_in_registers = p.tiling.sums_in_shared && p.tiling.pairs <= kChunkPairs && width_of(params) <= kMostRegisterDim;
    b.tables.entries = p.entries;
    b.tables.tables_per_head = int64_t{p.runs} * p.tiling.warps;
    b.tables.offset = arena.bytes();
    p.partials = arena.take<float>(params.heads * b.tables.tables_per_head * p.entries);
    if (!p.tiling.sums_in_shared) p.sums = arena.take<float4>(warps * p.runs * p.tiling.pairs * kPairFloat4);
  }
  return b;
}

bool serves(const LocalAttentionParams& params) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return false;
  if (params.head_dim < 8 || params.value_dim < 8 || max_of(params.head_dim, params.value_dim) > kMostDim) return false;
  int64_t largest = max_of(params.batch, params.heads);
  for (const Axis& axis : params.axis) largest = max_of(largest, max_of(axis.length, axis.dilation));
  if (largest >= int64_t{1} << 31) return false;
  if (!(kLeastScale <= params.scale && params.scale <= kMostScale)) return false;
  return can_load_vectors<__half>(params);  // of either 16-bit type
}

bool tables_are_small(const LocalAttentionParams& params, const Tiling& tiling) {
  return tiling.fragments(fragment_heads(params)) * static_cast<int64_t>(sizeof(float4)) <= kMostFragmentBytes &&
         tiling.ctas * params.batch * params.heads <= kMostCtas;
}

// f(Kernels<T, kDim>()) of the op's storage type and width.
template <class F>
Status with_kernels(const LocalAttentionParams& params, F&& f) {
  const auto with_width = [&](auto type) {
    using T = decltype(type);
    switch (width_of(params)) {
      case 16:
        return f(Kernels<T, 16>());
      case 32:
        return f(Kernels<T, 32>());
      case 64:
        return f(Kernels<T, 64>());
      default:
        return f(Kernels<T, 128>());
    }
  };
  return params.dtype == DType::kFloat16 ? with_width(__half()) : with_width(__nv_bfloat16());
}

}  // namespace

bool serves_forward(const LocalAttentionParams& params) {
  return serves(params) && tables_are_small(params, forward_tiling(params));
}
bool serves_backward(const LocalAttentionParams& params) {
  return serves(params) && tables_are_small(params, query_tiling(params)) && tables_are_small(params, key_tiling(params));
}

int64_t forward_workspace(const LocalAttentionParams& params) {
  Arena arena(nullptr);
  make_params(params, forward_tiling(params), arena);
  return arena.bytes();
}
int64_t backward_workspace(const LocalAttentionParams& params) {
  Arena arena(nullptr);
  make_backward(params, arena);
  return arena.bytes();
}

Status forward(const LocalAttentionParams& params, void* stream) {
  Arena arena(params.workspace);
  Params p = make_params(params, forward_tiling(params), arena);
  set_tensor(p, forward_tensor::kKey, params.key);
  set_tensor(p, forward_tensor::kValue, params.value);
  set_tensor(p, forward_tensor::kQuery, params.query);
  set_tensor(p, forward_tensor::kOut, params.out);
  set_tensor(p, forward_tensor::kLse, params.lse, sizeof(float));
  const Status status = prepare(p, stream);
  if (!status.ok()) return status;
  return with_kernels(params, [&](auto kernels) { return kernels.forward(p, stream); });
}

Status backward(const LocalAttentionParams& params, void* stream) {
  Arena arena(params.workspace);
  const Backward b = make_backward(params, arena);
  Status status = prepare(b.query, stream);
  if (status.ok()) status = prepare(b.key, stream);
  if (status.ok()) status = with_kernels(params, [&](auto kernels) { return kernels.query(b.query, stream); });
  if (status.ok()) status = with_kernels(params, [&](auto kernels) { return kernels.key(b.key, stream); });
  if (!status.ok() || !params.drpb) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.heads * b.tables.entries, kWarps)));
  return launch(merge_tables<float>, grid, kThreads, 0, stream, params, b.tables);
}

}  // namespace natrpb::cuda::mma
