// V6's entropy probe: the risk softplus(up(norm(down(h)))) of a hidden state, in fp32; see LREProbe in
// sedac_export/exits/replay/probes.py.
//
// Down's outputs go round the blocks, which exchange them as words of a float and the depth: not every layer has a
// probe, so that parities would not alternate. The rest is small, and every warp computes it: so all decide alike about
// exits.
#pragma once
#include "residual.cuh"

constexpr float PROBE_EPSILON = 1e-5f;

struct Probe {
  // down [PROBE_WIDTH][hidden], the norm's weight and bias and up [PROBE_WIDTH] each, and up's bias
  const float* weights;
  const float* hidden;  // the block's copies of the rows' hidden states, [row][hidden]
  float* segments;      // in shared memory, [row][warp]
  float* scratch;
  int depth, blocks;

  // The risks of `rows`; lane 4t gets row t's.
  __device__ __forceinline__ float run(unsigned rows) const {
    publish(rows);
    const int lane = thread_index() & 31;
    float of_lane = 0;
#pragma unroll 1
    for (; rows; rows &= rows - 1) {
      const int row = __ffs(rows) - 1;
      const float risk = receive(row, lane);
      if (lane / 4 == row) of_lane = risk;
    }
    return of_lane;
  }

 private:
  __device__ __forceinline__ half* word(int row, int output) const {
    return reinterpret_cast<half*>(scratch + row * SCRATCH_ROW + SCRATCH_PROBE + 2 * output);
  }

  // The block's outputs of down.
  __device__ __forceinline__ void publish(unsigned rows) const {
    const int tid = thread_index(), row = tid / 4;
#pragma unroll 1
    for (int output = block_index(); output < PROBE_WIDTH; output += blocks) {
#pragma unroll 1
      for (unsigned left = rows; left; left &= left - 1) multiply(tid, __ffs(left) - 1, output);
      sync_block();
      const float sum = RowSums<1>::load(tid, segments);
      if (row < MAX_ROWS && tid % 4 == 0 && (rows >> row & 1))
        store_halves(word(row, output), static_cast<unsigned long long>(depth) << 32 | __float_as_uint(sum));
      sync_block();  // all have read the segments
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int tid, int row, int output) const {
    float q[1] = {0};
    for_pairs(tid, [&](int, int d) {
      const float2 w = *reinterpret_cast<const float2*>(weights + output * HIDDEN + d),
                   h = *reinterpret_cast<const float2*>(hidden + row * HIDDEN + d);
      q[0] = fmaf(w.y, h.y, fmaf(w.x, h.x, q[0]));
    });
    RowSums<1>::store(tid, q, segments + row * WARPS);
  }

  // A lane has two of the outputs.
  __device__ __forceinline__ float receive(int row, int lane) const {
    const float* rest = weights + PROBE_WIDTH * HIDDEN + 2 * lane;
    const float2 weight = load(rest), bias = load(rest + PROBE_WIDTH), up = load(rest + 2 * PROBE_WIDTH);
    const float up_bias = weights[PROBE_WIDTH * (HIDDEN + 3)];
    ulonglong2 words;
    while (words = load_halves(word(row, 2 * lane)), words.x >> 32 != depth || words.y >> 32 != depth) pause();
    __syncwarp();
    float x = __uint_as_float(static_cast<unsigned>(words.x)), y = __uint_as_float(static_cast<unsigned>(words.y));
    const float mean = sum_of_lanes(x + y) / PROBE_WIDTH;
    x -= mean, y -= mean;
    const float factor = rsqrtf(sum_of_lanes(fmaf(x, x, y * y)) / PROBE_WIDTH + PROBE_EPSILON);
    x = fmaf(x * factor, weight.x, bias.x), y = fmaf(y * factor, weight.y, bias.y);
    const float risk = sum_of_lanes(fmaf(x, up.x, y * up.y)) + up_bias;
    return fmaxf(risk, 0.f) + log1pf(expf(-fabsf(risk)));
  }

  __device__ __forceinline__ static float2 load(const float* p) { return *reinterpret_cast<const float2*>(p); }

  __device__ __forceinline__ static float sum_of_lanes(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
  }
};
// Apart from the kernel's own code, whose registers are scarce.
__device__ __noinline__ float probe_risks(unsigned rows, const float* weights, const float* hidden, float* segments,
                                          float* scratch, int depth, int blocks) {
  return Probe{weights, hidden, segments, scratch, depth, blocks}.run(rows);
}
static_assert(PROBE_WIDTH == 64, "a lane has two outputs");
