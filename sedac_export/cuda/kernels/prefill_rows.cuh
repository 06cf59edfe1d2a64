// Prefill between its products: what rows start from, and the residual stream.
#pragma once
#include "heads.cuh"
#include "tables.cuh"

// What prefill's kernels exchange, by row.
struct PrefillScratch {
  alignas(16) float residual[PREFILL_ROWS][HIDDEN];
  alignas(16) float products[PREFILL_ROWS][larger(QKV, HIDDEN)];    // of QKV, of O and of down
  alignas(16) half input[PREFILL_ROWS][larger(HIDDEN, ATTENTION)];  // of QKV, of O, and of gate and up
  alignas(16) half queries[PREFILL_ROWS][ATTENTION];
  alignas(16) half activations[PREFILL_ROWS][INNER];  // the input of down
  // The factor of the last norm, and by what a product of its input is to be scaled: see residual.cuh.
  float factor[PREFILL_ROWS], scale[PREFILL_ROWS];
};

// A row to each warp: the embedding of its token, and its norm.
extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_start(const __grid_constant__ PrefillPass pass, int, int) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!row && !lane) pass.times[0] = now();
  if (row >= pass.rows) return;
  PrefillScratch& scratch = *pass.scratch;
  const auto pair = [&](int d) {
    const float2 v = pair_of_row(pass.embed, HIDDEN_COLUMNS, pass.token[row], d);
    return make_float2(v.x * SEDAC_EMBEDDING_SCALE, v.y * SEDAC_EMBEDDING_SCALE);
  };
  for (int d = 2 * lane; d < HIDDEN; d += 64) *reinterpret_cast<float2*>(&scratch.residual[row][d]) = pair(d);
  const float factor = normalise(lane, scratch.input[row], pass.layers[0].attention_norm, 0, ReadyPairs{pair});
  if (!lane) scratch.factor[row] = factor, scratch.scale[row] = __fdividef(factor * HEADROOM, factor);
}

// By a warp: the factor of the norm of a row whose tiles of 16 numbers have these sums of squares.
__device__ __forceinline__ float norm_factor_of_tiles(const float* squares) {
  float sum = 0;
  for (int tile = threadIdx.x % 32; tile < O_TILES; tile += 32) sum += squares[tile];
  return norm_factor(sum_of_lanes<32>(sum));
}

// A row to each block, after O or after down: the product added to the residual, and the next norm. The same numbers
// as Stages::add and Residual make of them, whose words have a bit less.
__device__ __forceinline__ void add_product(const PrefillPass& pass, int layer, bool mlp) {
  __shared__ float squares[O_TILES], factor;
  const Layer& of = pass.layers[layer];
  const float* output_norm = mlp ? of.mlp_post_norm : of.attention_post_norm;
  const float* next = mlp ? pass.layers[min(layer + 1, LAYERS - 1)].attention_norm : of.mlp_norm;
  const int row = blockIdx.x;
  PrefillScratch& scratch = *pass.scratch;
  float *residual = scratch.residual[row], *product = scratch.products[row];
  const auto each = [&](auto f) {
    for (int i = threadIdx.x; i < HIDDEN; i += THREADS) f(i);  // HIDDEN is of whole warps
  };
  if (SEDAC_POST_NORMS) {
    each([&](int i) {
      const float v = product[i], sum = sum_of_lanes<16>(v * v);
      if (i % 16 == 0) squares[i / 16] = unflagged(sum);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      const float of_row = norm_factor_of_tiles(squares);
      if (!threadIdx.x) factor = of_row;
    }
    __syncthreads();
  }
  const float before = scratch.factor[row], scale = before * (1.f / HEADROOM);
  each([&](int i) {
    const float v = SEDAC_POST_NORMS ? product[i] * factor * output_norm[i] : product[i];
    const float h = unflagged(v + residual[i]), sum = sum_of_lanes<16>(h * h);
    const unsigned long long four = packed_lanes(h * next[i] * scale, i & 3);
    residual[i] = h;
    if (i % 16 == 0) squares[i / 16] = unflagged(sum);
    if (i % 4 == 0) *reinterpret_cast<unsigned long long*>(&scratch.input[row][i]) = four;
  });
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const float of_row = norm_factor_of_tiles(squares);
  if (threadIdx.x) return;
  scratch.factor[row] = of_row, scratch.scale[row] = __fdividef(of_row * HEADROOM, before);
  if (mlp && layer == LAYERS - 1 && row == pass.rows - 1) pass.times[1] = now();
}

// What a trained drafter takes of a row after `depth` layers.
__device__ __forceinline__ void take_features(const PrefillPass& pass, int depth) {
  const int row = blockIdx.x;
  for (int f = 0; f < pass.features; f++) {
    if (pass.feature_depths[f] != depth) continue;
    const size_t position = static_cast<size_t>(pass.slot) * pass.capacity + pass.start + row;
    unsigned short* to = pass.feature_states + (position * pass.features + f) * HIDDEN;
    for (int d = threadIdx.x; d < HIDDEN; d += THREADS)
      to[d] = __float_as_uint(pass.scratch->residual[row][d]) + 0x8000 >> 16;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_add(const __grid_constant__ PrefillPass pass, int layer, int stage) {
  add_product(pass, layer, stage == STAGE_DOWN);
  if (stage == STAGE_DOWN) take_features(pass, layer + 1);  // each thread's own numbers
}
