// The head of a batch: logits of the rows that want them, the highest of each, and the winner of each sampled row's
// race.
#pragma once
#include "batch_products.cuh"
#include "batch_residual.cuh"
#include "head.cuh"

// By a block, of the blocks and warps that have the tiles that they have in head.cuh: logits of all rows. `await`: see
// BatchProduct::run.
template <class Await>
__device__ __forceinline__ void multiply_head(const BatchPass& pass, BatchMemory& memory, int block, Await await) {
  const int blocks = pass.blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = tile_count(block, HEAD_TILES, blocks), rounds = tiles / WARPS, rest = tiles % WARPS;
  // tile, first column, end, part | parts << 8
  const int4 share = last_head_share(warp, block, blocks);
  const int parts = share.w >> 8;
#pragma unroll 1
  for (int first_row = 0; first_row < pass.logits_rows; first_row += BATCH_TOKENS) {
    BatchProduct product{memory, pass.scratch->head_input[first_row], HIDDEN, pass.logits_rows - first_row};
    const auto write = [&](int token, int output, float logit) {
      if (first_row + token >= pass.logits_rows || output >= VOCABULARY) return;
      logit *= HEADROOM;
      if (SEDAC_LOGITS_SOFTCAP != 0.f) logit = tanhf(logit * (1.f / SEDAC_LOGITS_SOFTCAP)) * SEDAC_LOGITS_SOFTCAP;
      pass.logits[static_cast<size_t>(first_row + token) * VOCABULARY + output] = logit;
    };
    const auto await_first = [&] {
      if (!first_row) await();
    };
    product.run(
        pass.head, HIDDEN_COLUMNS, {block + warp * blocks, 0}, rounds * HIDDEN_COLUMNS, WARPS * blocks, await_first,
        [] {},
        [&](int tile) {
#pragma unroll
          for (int n = 0; n < BATCH_TOKEN_TILES; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
              write(n * 8 + lane % 4 * 2 + q % 2, tile * 16 + lane / 4 + q / 2 * 8, product.take(n, q));
        });
    if (!rest) continue;
    __syncthreads();  // nobody reads sums any more
    product.run(
        pass.head, HIDDEN_COLUMNS, {share.x, share.y}, share.z - share.y, 0, [] {}, [] {},
        [&](int) { product.keep(warp); });
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < rest && threadIdx.x < 8 * BATCH_TOKENS; i++) {
      const int output = threadIdx.x % 8, token = threadIdx.x / 8, tile = block + (rounds * WARPS + i) * blocks;
      const float2 v = product.sum(i * parts, parts, output, token);
      write(token, tile * 16 + output, v.x), write(token, tile * 16 + output + 8, v.y);
    }
  }
}

// The best of a block's threads, in its first warp.
template <class Best>
__device__ __forceinline__ void merge_block(Best& best) {
  __shared__ int4 warps[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) merge_lanes(best, step);
  if (!lane) warps[warp] = best.words();
  __syncthreads();
  if (!warp) best = lane < WARPS ? Best::of(warps[lane]) : Best{};
  for (int step = 1; step < WARPS; step *= 2) merge_lanes(best, step);
}

// By a block, of number `share` among CANDIDATE_BLOCKS: the best of a share of a row's tokens.
__device__ __forceinline__ void find_candidates(const BatchPass& pass, int row, int share) {
  const bool sampled = pass.sampled >> row & 1;
  const RowRace by = sampled ? pass.races[row] : RowRace{};
  const float* logits = pass.logits + static_cast<size_t>(row) * VOCABULARY;
  Highest highest;
  Race race;
  for (int token = share * THREADS + threadIdx.x; token < VOCABULARY; token += CANDIDATE_BLOCKS * THREADS) {
    const float logit = logits[token];
    highest.note(logit, token);
    if (sampled) race.note(logit, token, by);
  }
  merge_block(highest);
  if (!threadIdx.x) pass.scratch->candidates[0][row][share] = highest.words();
  if (!sampled) return;
  merge_block(race);
  if (!threadIdx.x) pass.scratch->candidates[1][row][share] = race.words();
}

// By a warp: what the host is told of a row.
__device__ __forceinline__ void choose_token(const BatchPass& pass, int row) {
  const int lane = threadIdx.x % 32;
  static_assert(CANDIDATE_BLOCKS <= 32, "a lane to each block's");
  const auto& candidates = pass.scratch->candidates;
  Highest highest = lane < CANDIDATE_BLOCKS ? Highest::of(candidates[0][row][lane]) : Highest{};
  Race race = lane < CANDIDATE_BLOCKS ? Race::of(candidates[1][row][lane]) : Race{};
  for (int step = 1; step < CANDIDATE_BLOCKS; step *= 2) merge_lanes(highest, step), merge_lanes(race, step);
  if (lane) return;
  pass.outcome->row[row] = {highest.token, highest.logit, highest.finite, highest.margin()};
  pass.chosen[row] = chosen_token(highest, race, pass.sampled >> row & 1);
  pass.outcome->race[row] = {race.token, race.logit, highest.sum, race.is_certain()};
  const RowExit* exit = exit_of(pass, pass.logits_row[row]);
  if (exit && exit->depth)
    pass.outcome->exit[row] = {exit->depth, exit->criterion};
  else
    pass.outcome->exit[row] = {LAYERS, -1};
}
