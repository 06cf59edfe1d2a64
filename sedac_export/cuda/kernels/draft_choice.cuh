// Which token a draft goes on with: the best of a block's tokens, then of all blocks'.
//
// Numbers of several lanes are compared by one instruction. (Merging the lanes' results two by two, as the head does,
// takes a block 2.9 us for those of 132 blocks.)
#pragma once
#include "head.cuh"

// The best of all lanes', as all lanes find it, but for the second.
__device__ __forceinline__ Highest best_of_lanes(const Highest& of) {
  const float logit = largest_of_lanes(of.logit);
  const unsigned token = __reduce_min_sync(~0u, of.logit == logit ? of.token : ~0u);
  // nothing less nothing is NaN
  const float sum = of.logit > -INFINITE ? of.sum * __expf(of.logit - logit) : 0.f;
  return {logit, -INFINITE, sum_of_lanes<32>(sum), token, static_cast<bool>(__all_sync(~0u, of.finite))};
}
__device__ __forceinline__ Race best_of_lanes(const Race& of) {
  const float score = largest_of_lanes(of.score);
  const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, of.score == score))) - 1;
  return {score, -INFINITE, __shfl_sync(~0u, of.logit, lane), __shfl_sync(~0u, of.token, lane)};
}
