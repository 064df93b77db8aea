#include "cuda/local_attention_rows_launch.cuh"

namespace natrpb::cuda {
template struct LocalAttentionRows<double>;
}
