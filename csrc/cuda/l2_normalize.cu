// Rows of unit length, forward and backward (natrpb/l2_normalize.h).
//
// A block takes neighboring rows of one head. As few lanes as read a row in one load each, a power of two, work on it together:
// 4 of the 32 for 32 channels of 16 bits, so that a warp's load brings eight rows. A row wider than a warp's load is read twice,
// the second time from L1.
//
//   each_row        grid: blocks of head 0, of head 1, ...; a block's threads form kThreads / lanes groups that take turns
//   merge_dfactor   one warp per head adds its blocks' parts in fp64, in a fixed order
//
// Bytes: x, in the backward pass dout too, read once, one tensor written; beside them one number per block.

#include "natrpb/l2_normalize.h"

#include <string>

#include "cuda/rows.cuh"

namespace natrpb::cuda {

namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int64_t kTurns = 8;  // rows that a group of lanes takes, where there are enough for a large GPU
constexpr int64_t kBlocksWanted = 2048;

// How the rows are dealt; depends on shapes and alignment alone.
struct Deal {
  int32_t lanes;  // per row
  int64_t rows_per_block;
  int64_t blocks_per_head;
};

// Sum over the `lanes` neighboring lanes that share a row; all of them get it.
template <class Acc>
__device__ __forceinline__ Acc group_sum(Acc x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// 1 / |x| from |x|^2, and 0 from 0. NB: written so that NaN stays NaN.
template <class Acc>
__device__ __forceinline__ Acc inverse_length(Acc square) {
  return square == 0 ? Acc(0) : 1 / std::sqrt(square);
}

template <class T, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    each_row(const __grid_constant__ L2NormalizeParams params, const __grid_constant__ Deal deal) {
  using Acc = Compute<T>;
  const int64_t head = blockIdx.x / deal.blocks_per_head, block = blockIdx.x % deal.blocks_per_head;
  const int lane = static_cast<int>(threadIdx.x) % deal.lanes, group = static_cast<int>(threadIdx.x) / deal.lanes;
  const int step = deal.lanes * V, channels = static_cast<int>(params.head_dim);
  const int64_t rows = params.batch * params.rows, begin = block * deal.rows_per_block;
  const int64_t end = min_of(begin + deal.rows_per_block, rows);
  const Acc factor = params.factor ? static_cast<const Acc*>(params.factor)[head] : Acc(1);
  Acc dfactor = 0;
  // NB: the bound is the same for all lanes of a warp, which shuffle together; groups without a row read the last one again.
  for (int64_t first = begin; first < end; first += kThreads / deal.lanes) {
    const bool valid = first + group < end;
    const uint32_t i = static_cast<uint32_t>(valid ? first + group : end - 1), length = static_cast<uint32_t>(params.rows);
    const int64_t batch = i / length, row = i % length;
    const T* x = static_cast<const T*>(params.x.data) + params.x.offset(batch, head, row);
    const T* dout = kBackward ? static_cast<const T*>(params.dout.data) + params.dout.offset(batch, head, row) : nullptr;
    const RowsView& result = kBackward ? params.dx : params.out;
    T* to = static_cast<T*>(result.data) + result.offset(batch, head, row);

    Acc v[V] = {}, dv[V] = {}, square = 0, product = 0;
    for (int c = lane * V; c < channels; c += step) {
      load<V>(x + c, v);
      if constexpr (kBackward) load<V>(dout + c, dv);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        square += v[k] * v[k];
        if constexpr (kBackward) product += v[k] * dv[k];
      }
    }
    const Acc inverse = inverse_length(group_sum(square, deal.lanes));
    const Acc along = kBackward ? inverse * group_sum(product, deal.lanes) : Acc(0);  // <u, dout>
    if (valid && lane == 0) dfactor += along;
    if (!valid) continue;
    for (int c = lane * V; c < channels; c += step) {
      if (channels > step) {  // otherwise v and dv still hold the row
        load<V>(x + c, v);
        if constexpr (kBackward) load<V>(dout + c, dv);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        v[k] = kBackward ? factor * inverse * (dv[k] - along * (v[k] * inverse)) : factor * inverse * v[k];
      }
      store<V>(to + c, v);
    }
  }
  if constexpr (kBackward) {
    if (!params.dfactor) return;
    Acc* parts = shared_memory<Acc>();
    dfactor = warp_sum(dfactor);
    if (lane_index() == 0) parts[threadIdx.x / kWarp] = dfactor;
    __syncthreads();
    if (threadIdx.x != 0) return;
    Acc sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp];
    static_cast<Acc*>(params.workspace)[blockIdx.x] = sum;
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    merge_dfactor(const __grid_constant__ L2NormalizeParams params, const __grid_constant__ Deal deal) {
  const int64_t head = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (head >= params.heads) return;
  const Acc* parts = static_cast<const Acc*>(params.workspace) + head * deal.blocks_per_head;
  double sum = 0;
  for (int64_t block = lane_index(); block < deal.blocks_per_head; block += kWarp) sum += parts[block];
  sum = warp_sum(sum);
  if (lane_index() == 0) static_cast<Acc*>(params.dfactor)[head] = static_cast<Acc>(sum);
}

// ---- launchers ----

// Whether every row of the tensors that the pass uses starts at a multiple of 16 bytes.
template <class T>
bool can_load_vectors(const L2NormalizeParams& params) {
  const auto aligned = [](int64_t extent, int64_t stride) { return extent <= 1 || stride % kVector<T> == 0; };
  bool all = params.head_dim % kVector<T> == 0;
  for (const RowsView* view : {&params.x, &params.out, &params.dout, &params.dx}) {
    all = all && reinterpret_cast<uintptr_t>(view->data) % 16 == 0 && aligned(params.batch, view->batch) &&
          aligned(params.heads, view->head) && aligned(params.rows, view->row);
  }
  return all;
}

// NB: on `vector` only the lanes depend: the workspace is asked for without knowing it.
Deal deal_rows(const L2NormalizeParams& params, int vector) {
  const int64_t rows = params.batch * params.rows, blocks = ceil_div(kBlocksWanted, max_of(params.heads, 1));
  Deal deal;
  deal.lanes = 1;
  while (deal.lanes < kWarp && deal.lanes * vector < params.head_dim) deal.lanes *= 2;
  constexpr int64_t kMostRows = kThreads / 4 * kTurns;  // with the four lanes of 32 channels of 16 bits
  deal.rows_per_block = max_of(min_of(kMostRows, ceil_div(rows, blocks)), kWarps);
  deal.blocks_per_head = ceil_div(rows, deal.rows_per_block);
  return deal;
}

template <class T, int V, bool kBackward>
Status launch_rows(const L2NormalizeParams& params, void* stream) {
  using Acc = Compute<T>;
  const Deal deal = deal_rows(params, V);
  const int64_t blocks = deal.blocks_per_head * params.heads;
  if (max_of(max_of(params.batch * params.rows, params.head_dim), blocks) >= int64_t{1} << 31) {
    return Status::error("CUDA kernels take fewer than 2^31 rows, channels and blocks");
  }
  const int64_t shared = kBackward ? kWarps * static_cast<int64_t>(sizeof(Acc)) : 0;
  const Status status =
      launch(each_row<T, V, kBackward>, dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream, params, deal);
  if (!status.ok() || !kBackward || !params.dfactor) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.heads, kWarps)));
  return launch(merge_dfactor<Acc>, grid, kThreads, 0, stream, params, deal);
}

template <class T, bool kBackward>
Status launch_storage(const L2NormalizeParams& params, void* stream) {
  return can_load_vectors<T>(params) ? launch_rows<T, kVector<T>, kBackward>(params, stream)
                                     : launch_rows<T, 1, kBackward>(params, stream);
}

template <bool kBackward>
Status run(const L2NormalizeParams& params, void* stream) {
  switch (params.dtype) {
    case DType::kFloat64:
      return launch_storage<double, kBackward>(params, stream);
    case DType::kBFloat16:
      return launch_storage<__nv_bfloat16, kBackward>(params, stream);
    case DType::kFloat16:
      return launch_storage<__half, kBackward>(params, stream);
    default:
      return launch_storage<float, kBackward>(params, stream);
  }
}

}  // namespace

int64_t l2_normalize_backward_workspace(const L2NormalizeParams& params) {
  if (!params.factor) return 0;
  const size_t element = params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return params.heads * deal_rows(params, 1).blocks_per_head * static_cast<int64_t>(element);
}

Status l2_normalize(const L2NormalizeParams& params, void* stream) { return run<false>(params, stream); }
Status l2_normalize_backward(const L2NormalizeParams& params, void* stream) { return run<true>(params, stream); }

}  // namespace natrpb::cuda
