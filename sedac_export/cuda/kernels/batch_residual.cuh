// The residual stream of a batch: what rows start from, what layers add, and what goes to the head. The same numbers as
// Residual and Stages::add make, whose words have a bit less.
#pragma once
#include "batch_exits.cuh"

// By a warp: what a row starts from, the embedding of its token, and its norm.
__device__ __forceinline__ void start_row(const BatchPass& pass, int row) {
  const int lane = threadIdx.x % 32;
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

// By a block, of a row after O or after down: the product added to the residual, and the next norm; and after a layer
// whether the row exits.
__device__ __forceinline__ void add_product(const BatchPass& pass, const LayerPair& layers, int row, bool mlp,
                                            RowExit* exit) {
  __shared__ TileSums sums;
  __shared__ float factor;
  const float* output_norm = mlp ? layers.now.mlp_post_norm : layers.now.attention_post_norm;
  const float* next = mlp ? layers.next.attention_norm : layers.now.mlp_norm;
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
  if (exit && mlp && !exit->depth && layers.depth < LAYERS)
    decide_exit(pass, layers.now.probe, *exit, row, layers.depth, sums, before);
}

// By a block, after down, of a row whose hidden state stays: its norm before the layer that follows.
__device__ __forceinline__ void keep_row(const BatchPass& pass, const Layer& next, int row, float factor_before) {
  const float scale = factor_before * (1.f / HEADROOM);
  for (int i = threadIdx.x; i < HIDDEN; i += THREADS) {
    const unsigned long long four =
        packed_lanes(pass.scratch->residual[row][i] * next.attention_norm[i] * scale, i & 3);
    if (i % 4 == 0) *reinterpret_cast<unsigned long long*>(&pass.scratch->input[row][i]) = four;
  }
}

// By a block: what a trained drafter takes of a row after `depth` layers.
__device__ __forceinline__ void take_features(const BatchPass& pass, int row, int depth) {
  const int feature = feature_at(pass, depth);
  if (feature < 0) return;
  unsigned short* to = feature_place(pass, row, feature);
  for (int d = threadIdx.x; d < HIDDEN; d += THREADS) to[d] = feature_of(pass.scratch->residual[row][d]);
}

// By a block, of a row, after O or after down (`mlp`).
__device__ __forceinline__ void add_to_row(const BatchPass& pass, const LayerPair& layers, int row, bool mlp) {
  RowExit* exit = exit_of(pass, row);
  if (exit && exit->depth && exit->rule.freezes) {
    if (mlp) keep_row(pass, layers.next, row, exit->factor_before);
  } else {
    add_product(pass, layers, row, mlp, exit);
  }
  if (mlp) take_features(pass, row, layers.depth);  // each thread's own numbers
}

// By a warp: the head's input of the row whose logits are number `index`.
__device__ __forceinline__ void finish_row(const BatchPass& pass, int index) {
  const int row = pass.logits_row[index];
  const RowExit* exit = exit_of(pass, row);
  const float* residual = exit && exit->depth ? exit->hidden : pass.scratch->residual[row];
  const auto pair = [&](int d) { return *reinterpret_cast<const float2*>(residual + d); };
  normalise(threadIdx.x % 32, pass.scratch->head_input[index], pass.final_norm, 0, ReadyPairs{pair});
}
