// Norms' factors of a small batch, whose residual stream is added to where products are summed: each block finds the
// factors of all rows itself, from the sums of squares that each tile leaves, instead of waiting until a row's block
// has.
#pragma once
#include "batch_exits.cuh"

// By row: the factors of the layer's two norms, and by what the product of the newest one's input is to be scaled.
struct RowFactors {
  float attention[SMALL_BATCH_ROWS], mlp[SMALL_BATCH_ROWS], scale[SMALL_BATCH_ROWS];

  // By a block: those that each row's block or warp left.
  __device__ __forceinline__ void load(const BatchPass& pass, bool of_mlp) {
    for (int row = threadIdx.x; row < pass.rows; row += THREADS) {
      (of_mlp ? mlp : attention)[row] = pass.scratch->factor[row];
      scale[row] = pass.scratch->scale[row];
    }
  }

  // By a block, some rows to each warp: from what the tiles of O (`of_mlp`) or of down left, which is asked for at
  // once.
  __device__ __forceinline__ void find(const BatchPass& pass, bool of_mlp) {
    constexpr int EACH = SMALL_BATCH_ROWS / WARPS, AT_ONCE = 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int begin = 0; begin < EACH && begin * WARPS + warp < pass.rows; begin += AT_ONCE) {
      float sums[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int row = min((begin + k) * WARPS + warp, pass.rows - 1);
        sums[k] = sum_of_lane(pass.scratch->squares[of_mlp][row]);
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int row = (begin + k) * WARPS + warp;
        const float now = norm_factor(sum_of_lanes<32>(sums[k]));
        if (row >= pass.rows || lane) continue;
        const float before = of_mlp ? attention[row] : mlp[row];
        (of_mlp ? mlp : attention)[row] = now, scale[row] = __fdividef(now * HEADROOM, before);
      }
    }
  }
};
