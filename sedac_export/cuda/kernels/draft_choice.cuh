// Which token a draft goes on with: the best of a block's tokens, then of all blocks'.
//
// Numbers of several lanes are compared by one instruction. (Merging the lanes' results two by two, as the head does,
// takes a block 2.9 us for those of 132 blocks.)
#pragma once
#include "head.cuh"

// As numbers of floats' order.
__device__ __forceinline__ unsigned ordered(float v) {
  const int bits = __float_as_int(v);
  return static_cast<unsigned>(bits ^ (bits >> 31 | static_cast<int>(0x80000000)));
}
__device__ __forceinline__ float of_ordered(unsigned v) {
  return __int_as_float(static_cast<int>(v & 0x80000000 ? v ^ 0x80000000 : ~v));
}
// Of a warp; none is NaN.
__device__ __forceinline__ float largest_of_lanes(float v) { return of_ordered(__reduce_max_sync(~0u, ordered(v))); }

// The best of `COUNT` of each lane, as all lanes find it, but for the second.
template <int COUNT>
__device__ __forceinline__ Highest best_of_lanes(const Highest (&each)[COUNT]) {
  Highest best;
#pragma unroll
  for (int k = 0; k < COUNT; k++) best.logit = fmaxf(best.logit, each[k].logit), best.finite &= each[k].finite;
  best.logit = largest_of_lanes(best.logit);
  unsigned token = ~0u;
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    if (each[k].logit == best.logit) token = min(token, each[k].token);
    // nothing less nothing is NaN
    const float factor = each[k].logit > -INFINITE ? __expf(each[k].logit - best.logit) : 0.f;
    best.sum = fmaf(each[k].sum, factor, best.sum);
  }
  best.token = __reduce_min_sync(~0u, token);
  best.sum = sum_of_lanes<32>(best.sum);
  best.finite = __all_sync(~0u, best.finite);
  return best;
}
template <int COUNT>
__device__ __forceinline__ Race best_of_lanes(const Race (&each)[COUNT]) {
  Race best;
#pragma unroll
  for (int k = 0; k < COUNT; k++)
    if (each[k].score > best.score) best = each[k];
  const float score = largest_of_lanes(best.score);
  const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, best.score == score))) - 1;
  best.score = score;
  best.logit = __shfl_sync(~0u, best.logit, lane), best.token = __shfl_sync(~0u, best.token, lane);
  return best;
}
