// The residual stream of a batch: what rows start from, what layers add, and what goes to the head. The same numbers as
// Residual and Stages::add make, whose words have a bit less.
#pragma once
#include "batch_exits.cuh"

// A row to each warp: the embedding of its token, and its norm.
extern "C" __global__ void __launch_bounds__(THREADS) batch_start(const __grid_constant__ BatchPass pass, int, int) {
  follow_previous_kernel();
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!row && !lane) pass.outcome->started = now();
  if (row >= pass.rows) return;
  if (pass.deciding) start_exit(pass, row);
  BatchScratch& scratch = *pass.scratch;
  const auto pair = [&](int d) {
    const float2 v = pair_of_row(pass.embed, HIDDEN_COLUMNS, pass.row[row].token, d);
    return make_float2(v.x * SEDAC_EMBEDDING_SCALE, v.y * SEDAC_EMBEDDING_SCALE);
  };
  for (int d = 2 * lane; d < HIDDEN; d += 64) *reinterpret_cast<float2*>(&scratch.residual[row][d]) = pair(d);
  const float factor = normalise(lane, scratch.input[row], pass.layers[0].attention_norm, 0, ReadyPairs{pair});
  if (!lane) scratch.factor[row] = factor, scratch.scale[row] = __fdividef(factor * HEADROOM, factor);
}

// A row to each block, after O or after down: the product added to the residual, and the next norm; and after a layer
// whether the row exits.
__device__ __forceinline__ void add_product(const BatchPass& pass, int layer, bool mlp, RowExit* exit) {
  __shared__ TileSums sums;
  __shared__ float factor;
  const Layer& of = pass.layers[layer];
  const float* output_norm = mlp ? of.mlp_post_norm : of.attention_post_norm;
  const float* next = mlp ? pass.layers[min(layer + 1, LAYERS - 1)].attention_norm : of.mlp_norm;
  const int row = blockIdx.x;
  BatchScratch& scratch = *pass.scratch;
  float *residual = scratch.residual[row], *product = scratch.products[row];
  const auto each = [&](auto f) {
    for (int i = threadIdx.x; i < HIDDEN; i += THREADS) f(i);  // HIDDEN is of whole warps
  };
  const auto sum_of_tile = [](float* of_tiles, int i, float v) {
    const float sum = sum_of_lanes<16>(v);
    if (i % 16 == 0) of_tiles[i / 16] = unflagged(sum);
  };
  if (SEDAC_POST_NORMS) {
    each([&](int i) { sum_of_tile(sums.squares, i, product[i] * product[i]); });
    __syncthreads();
    if (threadIdx.x < 32) {
      const float of_row = norm_factor(sum_of_tiles(sums.squares));
      if (!threadIdx.x) factor = of_row;
    }
    __syncthreads();
  }
  const float before = scratch.factor[row], scale = before * (1.f / HEADROOM);
  each([&](int i) {
    const float v = SEDAC_POST_NORMS ? product[i] * factor * output_norm[i] : product[i];
    const float old = residual[i], h = unflagged(v + old);
    sum_of_tile(sums.squares, i, h * h);
    const unsigned long long four = packed_lanes(h * next[i] * scale, i & 3);
    residual[i] = h;
    if (i % 4 == 0) *reinterpret_cast<unsigned long long*>(&scratch.input[row][i]) = four;
    if (!exit) return;
    if (!mlp) {
      exit->layer_input[i] = old;
    } else {
      const float input = exit->layer_input[i];
      sum_of_tile(sums.inner, i, input * h), sum_of_tile(sums.before, i, input * input);
    }
  });
  __syncthreads();
  if (threadIdx.x < 32) {
    const float of_row = norm_factor(sum_of_tiles(sums.squares));
    if (!threadIdx.x) scratch.factor[row] = of_row, scratch.scale[row] = __fdividef(of_row * HEADROOM, before);
  }
  if (exit && mlp && !exit->depth && layer + 1 < LAYERS) decide_exit(pass, *exit, row, layer + 1, sums, before);
}

// After down, of a row whose hidden state stays: its norm before the layer that follows.
__device__ __forceinline__ void keep_row(const BatchPass& pass, int layer, float factor_before) {
  const int row = blockIdx.x;
  const float *next = pass.layers[min(layer + 1, LAYERS - 1)].attention_norm, scale = factor_before * (1.f / HEADROOM);
  for (int i = threadIdx.x; i < HIDDEN; i += THREADS) {
    const unsigned long long four = packed_lanes(pass.scratch->residual[row][i] * next[i] * scale, i & 3);
    if (i % 4 == 0) *reinterpret_cast<unsigned long long*>(&pass.scratch->input[row][i]) = four;
  }
}

// What a trained drafter takes of a row after `depth` layers.
__device__ __forceinline__ void take_features(const BatchPass& pass, int depth) {
  const int row = blockIdx.x;
  for (int f = 0; f < pass.features; f++) {
    if (pass.feature_depths[f] != depth) continue;
    const size_t position = static_cast<size_t>(pass.row[row].slot) * pass.capacity + pass.row[row].position;
    unsigned short* to = pass.feature_states + (position * pass.features + f) * HIDDEN;
    for (int d = threadIdx.x; d < HIDDEN; d += THREADS)
      to[d] = __float_as_uint(pass.scratch->residual[row][d]) + 0x8000 >> 16;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    batch_add(const __grid_constant__ BatchPass pass, int layer, int stage) {
  follow_previous_kernel();
  const bool mlp = stage == STAGE_DOWN;
  RowExit* exit = exit_of(pass, blockIdx.x);
  if (exit && exit->depth && exit->rule.freezes) {
    if (mlp) keep_row(pass, layer, exit->factor_before);
  } else {
    add_product(pass, layer, mlp, exit);
  }
  if (mlp) take_features(pass, layer + 1);  // each thread's own numbers
  if (mlp && layer == LAYERS - 1 && blockIdx.x == pass.rows - 1 && !threadIdx.x) pass.outcome->layers_ended = now();
}

// A row to each warp: the head's input of a row whose logits are wanted.
extern "C" __global__ void __launch_bounds__(THREADS) batch_finish(const __grid_constant__ BatchPass pass, int, int) {
  follow_previous_kernel();
  const int index = blockIdx.x * WARPS + threadIdx.x / 32;
  if (index >= pass.logits_rows) return;
  const int row = pass.logits_row[index];
  const RowExit* exit = exit_of(pass, row);
  const float* residual = exit && exit->depth ? exit->hidden : pass.scratch->residual[row];
  const auto pair = [&](int d) { return *reinterpret_cast<const float2*>(residual + d); };
  normalise(threadIdx.x % 32, pass.scratch->head_input[index], pass.final_norm, 0, ReadyPairs{pair});
}
