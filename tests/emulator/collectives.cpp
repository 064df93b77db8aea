// Shuffles, votes and __syncwarp.
#include "emulator.h"

namespace natrpb::emulator {

namespace {

void shuffle_all(void* const (&operands)[kWarpSize], uint32_t mask) {
  uint64_t values[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) values[lane] = static_cast<const Shuffle*>(operands[lane])->value;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      Shuffle& mine = *static_cast<Shuffle*>(operands[lane]);
      mine.value = values[mine.source];
    }
  }
}

uint32_t ballot(void* const (&operands)[kWarpSize], uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) votes |= *static_cast<const uint32_t*>(operands[lane]) << lane;
  }
  return votes;
}

void answer(void* const (&operands)[kWarpSize], uint32_t mask, uint32_t result) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) *static_cast<uint32_t*>(operands[lane]) = result;
  }
}

}  // namespace

const Collective kShuffle{"__shfl_sync", shuffle_all};
const Collective kShuffleXor{"__shfl_xor_sync", shuffle_all};
const Collective kShuffleDown{"__shfl_down_sync", shuffle_all};
const Collective kBallot{
    "__ballot_sync", [](void* const (&operands)[kWarpSize], uint32_t mask) { answer(operands, mask, ballot(operands, mask)); }};
const Collective kAny{"__any_sync", [](void* const (&operands)[kWarpSize], uint32_t mask) {
                        answer(operands, mask, ballot(operands, mask) != 0);
                      }};
const Collective kAll{"__all_sync", [](void* const (&operands)[kWarpSize], uint32_t mask) {
                        answer(operands, mask, ballot(operands, mask) == mask);
                      }};
const Collective kSyncwarp{"__syncwarp", nullptr, true};

}  // namespace natrpb::emulator
