// Exits of a batch. Its rows go through every layer, since usually at least one does: what a row has when its rule says
// stop goes to the head, and the layers that follow only fill its caches. Signals have the bits that a pass gives them.
#pragma once
#include "batch_rows.cuh"
#include "probe.cuh"

// Sums over each tile of 16 numbers of a row: of squares, of products with the layer's input, and of the input's
// squares.
struct TileSums {
  float squares[O_TILES], inner[O_TILES], before[O_TILES];
};

// By a warp: what the tiles of a row have together, and a lane's part of it.
__device__ __forceinline__ float sum_of_lane(const float* of_tiles) {
  const int lane = threadIdx.x % 32;
  float of_tile[TILES_OF_LANE], sum = 0;
#pragma unroll
  for (int k = 0; k < TILES_OF_LANE; k++) of_tile[k] = lane + k * 32 < O_TILES ? of_tiles[lane + k * 32] : 0.f;
#pragma unroll
  for (int k = 0; k < TILES_OF_LANE; k++) sum += of_tile[k];
  return sum;
}
__device__ __forceinline__ float sum_of_tiles(const float* of_tiles) { return sum_of_lanes<32>(sum_of_lane(of_tiles)); }

// By a warp: looks for the rule that decides about `row`.
__device__ __forceinline__ void start_exit(const BatchPass& pass, int row) {
  const int lane = threadIdx.x % 32;
  int index = -1;
  for (int i = lane; i < pass.logits_rows; i += 32)
    if (pass.logits_row[i] == row && pass.deciding >> i & 1) index = i;
  index = __reduce_max_sync(~0u, index);
  if (lane) return;
  pass.scratch->exit_of_row[row] = index;
  if (index < 0) return;
  RowExit& exit = pass.scratch->exit[index];
  exit.rule = pass.rules[index];
  for (Criterion& seen : exit.seen) seen = {};
  exit.depth = 0;
}

// Null where no rule decides about the row.
__device__ __forceinline__ RowExit* exit_of(const BatchPass& pass, int row) {
  const int index = pass.deciding ? pass.scratch->exit_of_row[row] : -1;
  return index < 0 ? nullptr : &pass.scratch->exit[index];
}

// By a block: down's outputs of the probe after `depth` layers.
__device__ __forceinline__ void multiply_by_probe(const float* probe, const float* hidden, float* outputs) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto pair = [&](int d) { return *reinterpret_cast<const float2*>(hidden + d); };
  for (int output = warp; output < PROBE_WIDTH; output += WARPS) {
    const float sum = product_with_row(lane, probe + output * HIDDEN, ReadyPairs{pair});
    if (!lane) outputs[output] = sum;
  }
}

// By a block that has written a row after `depth` layers, whose entropy probe there is `probe`: whether it exits.
__device__ __forceinline__ void decide_exit(const BatchPass& pass, const float* probe, RowExit& exit, int row,
                                            int depth, const TileSums& sums, float factor_before) {
  __shared__ float outputs[PROBE_WIDTH];
  __shared__ bool exits;
  const int lane = threadIdx.x % 32;
  const float* hidden = pass.scratch->residual[row];
  const bool present = lane < exit.rule.criteria;
  const Condition condition = present ? exit.rule.conditions[lane * LAYERS + depth - 1] : Condition{};
  const bool asks_probe = condition.signal == SIGNAL_RISK, probed = __any_sync(~0u, asks_probe);
  if (probed) multiply_by_probe(probe, hidden, outputs);
  __syncthreads();
  if (threadIdx.x < 32) {
    const float squares = sum_of_tiles(sums.squares), inner = sum_of_tiles(sums.inner);
    const float stability = fmaf(inner * rsqrtf(sum_of_tiles(sums.before) * squares), 0.5f, 0.5f);
    const float risk = probed ? risk_of_outputs(lane, outputs[2 * lane], outputs[2 * lane + 1], probe) : 0.f;
    Criterion seen = present ? exit.seen[lane] : Criterion{};
    const unsigned says = __ballot_sync(~0u, seen.satisfied(condition, asks_probe ? risk : stability));
    if (present) exit.seen[lane] = seen;
    if (!lane) {
      exits = says;
      if (says) exit.depth = depth, exit.criterion = __ffs(says) - 1, exit.factor_before = factor_before;
    }
  }
  __syncthreads();
  if (!exits) return;
  for (int i = threadIdx.x; i < HIDDEN; i += THREADS) exit.hidden[i] = hidden[i];
}
static_assert(MAX_CRITERIA <= 32, "a lane to each criterion");
