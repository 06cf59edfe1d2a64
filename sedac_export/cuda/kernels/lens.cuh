// Tuned lenses: an affine map of the hidden state at an exit, after which the head says what full depth would; see
// sedac_export/exits/training/lens.py.
//
// Its outputs go round all warps of all blocks, which exchange them as words: so a lens costs a read of its matrix by
// the whole device, and a trip to L2.
#pragma once
#include "exits.cuh"
#include "probe.cuh"
#include "shared.cuh"

// Beside what is exchanged about exits after `depth` layers of a step.
__device__ __forceinline__ unsigned exit_number(const Pass& pass, int step, int depth) {
  return (pass.number + step) * (LAYERS + 1) + depth;
}
// Of a row: the words at `offset` of its part of the scratch.
__device__ __forceinline__ ulonglong2* exit_words(float* scratch, int row, int offset) {
  return reinterpret_cast<ulonglong2*>(scratch + SCRATCH_EXITS + static_cast<size_t>(row) * EXIT_ROW + offset);
}
__device__ __forceinline__ void store_number(ulonglong2* words, int index, unsigned number, float v) {
  store_halves(reinterpret_cast<half*>(words) + 4 * index,
               static_cast<unsigned long long>(number) << 32 | __float_as_uint(v));
}

// What a lens, [hidden][hidden] and a bias [hidden], makes of rows of the residual stream.
struct Lens {
  const float* weights;
  float* scratch;
  unsigned number, parities;  // of what is exchanged; of the layer's flags, a bit for each row
  int blocks;

  __device__ __forceinline__ void publish(unsigned rows) const {
    const int tid = thread_index(), lane = tid & 31;
#pragma unroll 1
    for (; rows; rows &= rows - 1) {
      const int row = __ffs(rows) - 1;
      const StreamPairs stream{scratch + row * SCRATCH_ROW + SCRATCH_AFTER_LAYER, parities >> row};
#pragma unroll 1
      for (int output = block_index() + blocks * (tid / 32); output < HIDDEN; output += blocks * WARPS) {
        const float sum = product_with_row(lane, weights + static_cast<size_t>(output) * HIDDEN, stream);
        if (!lane) store_number(exit_words(scratch, row, 0), output, number, sum + weights[HIDDEN * HIDDEN + output]);
        __syncwarp();
      }
    }
  }

  // By a warp: the norm of a row that was published.
  __device__ __forceinline__ void normalise_row(int lane, int row, const float* weight, half* to) const {
    normalise(lane, to, weight, 0, NumberedPairs{exit_words(scratch, row, 0), number});
  }
};

template <int N>
__device__ __forceinline__ Lens lens_after(const Pass& pass, const Shared<N>& shared, float* scratch, int depth,
                                           unsigned parities) {
  return {shared.layers[depth - 1].lens, scratch, exit_number(pass, shared.step, depth), parities, pass.blocks};
}

// By a warp: its row's norm, through the lens where there is one.
__device__ __forceinline__ void normalise_exit(const Lens& lens, int lane, int row, const float* weight, half* to) {
  if (lens.weights)
    lens.normalise_row(lane, row, weight, to);
  else
    normalise(lane, to, weight, 0,
              StreamPairs{lens.scratch + row * SCRATCH_ROW + SCRATCH_AFTER_LAYER, lens.parities >> row});
}

// The head's input, of rows that have stopped, where lenses may be in between: a row to each warp. `depth`: at which
// the lane's sequence stopped.
template <int N>
__device__ __forceinline__ void finish_through_lenses(const Pass& pass, Shared<N>& shared, float* scratch, int depth,
                                                      unsigned odd) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31;
  const auto stopped_at = [&](int row) { return __shfl_sync(~0u, depth, MAX_CRITERIA * pass.row[row].sequence); };
  const auto lens_at = [&](int stopped) {
    return lens_after(pass, shared, scratch, stopped, layer_parities(odd, stopped - 1));
  };
#pragma unroll 1
  for (unsigned rows = pass.logits_rows; rows; rows &= rows - 1) {
    const int row = __ffs(rows) - 1, stopped = stopped_at(row);
    const Lens lens = lens_at(stopped);
    if (lens.weights && pass.row[row].first_layer < stopped) lens.publish(rows & -rows);
  }
  if (!(pass.logits_rows >> warp & 1)) return;
  const int stopped = stopped_at(warp);
  if (pass.row[warp].first_layer < stopped)
    normalise_exit(lens_at(stopped), lane, warp, pass.final_norm, shared.input[warp]);
}
