// V6's entropy probe: the risk softplus(up(norm(down(h)))) of a hidden state, in fp32; see LREProbe in
// sedac_export/exits/replay/probes.py.
//
// Down's outputs go round the blocks, which exchange them as words of a float and a number that no other step and depth
// has: not every layer has a probe, so that parities would not alternate. The rest is small, and every warp computes
// it: so all decide alike about exits.
#pragma once
#include "norm.cuh"

constexpr float PROBE_EPSILON = 1e-5f;

// By a warp: the sum of `weight` times a row.
template <class Source>
__device__ __forceinline__ float product_with_row(int lane, const float* weight, Source source) {
  constexpr int PAIRS = divided_up(HIDDEN, 64), AT_ONCE = PAIRS <= 16 ? PAIRS : 8;
  float sum = 0;
#pragma unroll 1
  for (int first = 2 * lane; first < HIDDEN; first += AT_ONCE * 64) {
    typename Source::Loaded v[AT_ONCE];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (first + k * 64 < HIDDEN) v[k] = source.load(first + k * 64);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (first + k * 64 < HIDDEN) all &= source.here(v[k]);
    } while (!all);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
      if (first + k * 64 < HIDDEN) {
        const float2 x = source.value(v[k]), w = *reinterpret_cast<const float2*>(weight + first + k * 64);
        sum = fmaf(w.y, x.y, fmaf(w.x, x.x, sum));
      }
  }
  __syncwarp();
  return sum_of_lanes<32>(sum);
}

// By a warp, whose lanes have two of down's outputs each: the risk. `weights`: the probe's.
__device__ __forceinline__ float risk_of_outputs(int lane, float x, float y, const float* weights) {
  const auto load = [](const float* p) { return *reinterpret_cast<const float2*>(p); };
  const float* rest = weights + PROBE_WIDTH * HIDDEN + 2 * lane;
  const float2 weight = load(rest), bias = load(rest + PROBE_WIDTH), up = load(rest + 2 * PROBE_WIDTH);
  const float up_bias = weights[PROBE_WIDTH * (HIDDEN + 3)];
  const float mean = sum_of_lanes<32>(x + y) / PROBE_WIDTH;
  x -= mean, y -= mean;
  const float factor = rsqrtf(sum_of_lanes<32>(fmaf(x, x, y * y)) / PROBE_WIDTH + PROBE_EPSILON);
  x = fmaf(x * factor, weight.x, bias.x), y = fmaf(y * factor, weight.y, bias.y);
  const float risk = sum_of_lanes<32>(fmaf(x, up.x, y * up.y)) + up_bias;
  return fmaxf(risk, 0.f) + log1pf(expf(-fabsf(risk)));
}

struct Probe {
  // down [PROBE_WIDTH][hidden], the norm's weight and bias and up [PROBE_WIDTH] each, and up's bias
  const float* weights;
  float* scratch;
  int blocks;
  unsigned number, parities;  // of what is exchanged; of the layer's flags, a bit for each row

  // By the row's warp.
  __device__ __forceinline__ float risk(int row, int lane) const {
    for (int output = block_index(); output < PROBE_WIDTH; output += blocks) publish(row, lane, output);
    __syncwarp();
    return receive(row, lane);
  }

 private:
  __device__ __forceinline__ half* word(int row, int output) const {
    return reinterpret_cast<half*>(scratch + row * SCRATCH_ROW + SCRATCH_PROBE + 2 * output);
  }

  // By the row's warp: one of the block's outputs of down.
  __device__ __forceinline__ void publish(int row, int lane, int output) const {
    const float* hidden = scratch + row * SCRATCH_ROW + SCRATCH_AFTER_LAYER;
    const float sum = product_with_row(lane, weights + output * HIDDEN, StreamPairs{hidden, parities >> row});
    if (!lane) store_halves(word(row, output), static_cast<unsigned long long>(number) << 32 | __float_as_uint(sum));
  }

  // A lane has two of the outputs.
  __device__ __forceinline__ float receive(int row, int lane) const {
    ulonglong2 words;
    while (words = load_halves(word(row, 2 * lane)), words.x >> 32 != number || words.y >> 32 != number) continue;
    __syncwarp();
    return risk_of_outputs(lane, __uint_as_float(static_cast<unsigned>(words.x)),
                           __uint_as_float(static_cast<unsigned>(words.y)), weights);
  }
};
static_assert(PROBE_WIDTH == 64, "a lane has two outputs");
