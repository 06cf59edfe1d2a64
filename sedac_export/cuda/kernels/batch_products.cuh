// Products of some tokens, as decoding several sequences has them: the chain's blocks and warps, each with the columns
// that it has there (tables.cuh), and BATCH_TOKENS tokens.
//
// So every block reads as much of the weights, all of them at once, and a warp's tokens come along with its weights:
// with so many, they are more than shared memory holds.
#pragma once
#include "batch_outputs.cuh"
#include "batch_tables.cuh"

constexpr int BATCH_TOKEN_TILES = BATCH_TOKENS / 8;

// A column block of a tile, and the tokens' numbers that it meets.
struct BatchInput {
  alignas(16) char weights[BLOCK_BYTES];
  alignas(16) half tokens[BATCH_TOKENS][32];
};
// A warp's sums of a tile, as the mma's lanes have them.
using BatchSums = float[BATCH_TOKEN_TILES * 4][32];

constexpr int BATCH_SUMS = MAX_TILES + WARPS;  // of a block: see cut_stage
constexpr int BATCH_INPUTS_FIT = (BATCH_STAGE_LIMIT - BATCH_SUMS * sizeof(BatchSums)) / (WARPS * sizeof(BatchInput));
constexpr int BATCH_INPUTS = BATCH_INPUTS_FIT < 8 ? BATCH_INPUTS_FIT : 8;  // of a warp, under way
static_assert(BATCH_INPUTS >= 2, "shared memory is too small for products of batches");

struct BatchMemory {
  BatchInput inputs[WARPS][BATCH_INPUTS];
  BatchSums sums[BATCH_SUMS];
};

struct BatchProduct {
  BatchMemory& memory;
  const half* tokens;  // of the first row
  int width, rows;     // of a row; rows that there are
  float c[BATCH_TOKEN_TILES][4] = {}, d[BATCH_TOKEN_TILES][4] = {};

  // Multiplies `count` column blocks of a matrix whose tiles have `columns`, and calls `end` with the number of a tile
  // where the warp's part of it has ended. `await` returns when the tokens' numbers are there: weights are asked for
  // before. `meanwhile` runs while the first tokens come.
  template <class Await, class Meanwhile, class End>
  __device__ __forceinline__ void run(const char* matrix, int columns, ColumnWalk walk, int count, int stride,
                                      Await await, Meanwhile meanwhile, End end) {
    ColumnWalk ahead = walk;
    for (int i = 0; i < min(BATCH_INPUTS - 1, count); i++, ahead.advance(columns, stride))
      copy_weights(i, matrix, columns, ahead);
    await();
    ahead = walk;
#pragma unroll 1
    for (int i = 0; i < BATCH_INPUTS - 1; i++) {
      if (i < count) copy_tokens(i, ahead.column), ahead.advance(columns, stride);
      end_copies();
    }
    meanwhile();
    int at = 0, free = BATCH_INPUTS - 1;  // inputs; free: what was read in the step before
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      wait_for_copies<BATCH_INPUTS - 2>();
      __syncwarp();
      if (i + BATCH_INPUTS - 1 < count) {
        copy_weights(free, matrix, columns, ahead);
        copy_tokens(free, ahead.column);
        ahead.advance(columns, stride);
      }
      end_copies();
      multiply(at);
      free = at, at = at + 1 < BATCH_INPUTS ? at + 1 : 0;
      const bool ends = walk.column + 1 == columns || i + 1 == count;
      if (ends) end(walk.tile);
      walk.advance(columns, stride);
    }
    wait_for_copies<0>();
    __syncwarp();
  }

  // Takes the sums of the part that has ended.
  __device__ __forceinline__ float take(int n, int q) {
    const float sum = c[n][q] + d[n][q];
    c[n][q] = d[n][q] = 0;
    return sum;
  }
  __device__ __forceinline__ void keep(int at) {
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++)
#pragma unroll
      for (int q = 0; q < 4; q++) memory.sums[at][n * 4 + q][threadIdx.x % 32] = take(n, q);
  }

  // Outputs `row` of a tile, below 8, and 8 more, of a token: the sums of `count` parts from `first` on, in their
  // order.
  __device__ __forceinline__ float2 sum(int first, int count, int row, int token) const {
    const int n = token / 8 * 4 + token % 2, lane = row * 4 + token % 8 / 2;
    float2 v = make_float2(0, 0);
    for (int i = first; i < first + count; i++) v.x += memory.sums[i][n][lane], v.y += memory.sums[i][n + 2][lane];
    return v;
  }

 private:
  __device__ __forceinline__ BatchInput& input(int at) { return memory.inputs[threadIdx.x / 32][at]; }

  __device__ __forceinline__ void copy_weights(int at, const char* matrix, int columns, ColumnWalk of) {
    const char* from = matrix + (static_cast<size_t>(of.tile) * columns + of.column) * BLOCK_BYTES;
    const unsigned to = shared_address(input(at).weights);
#pragma unroll
    for (int i = threadIdx.x % 32 * 16; i < divided_up(BLOCK_BYTES, 512) * 512; i += 512)
      if (i < BLOCK_BYTES) copy_16(to + i, from + i);
  }
  __device__ __forceinline__ void copy_tokens(int at, int column) {
    const int lane = threadIdx.x % 32;
    const unsigned to = shared_address(input(at).tokens) + lane * 16;
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++) {
      const int token = n * 8 + lane / 4;
      if (token < rows) copy_16(to + n * 512, tokens + token * width + column * 32 + lane % 4 * 8);
    }
  }

  __device__ __forceinline__ void multiply(int at) {
    const int lane = threadIdx.x % 32;
    const unsigned tokens = shared_address(input(at).tokens) + lane * 16;
    LaneWeights<WEIGHT_BITS> weights;
    weights.load(LanePlace(shared_address(input(at).weights), lane), 0);
    uint4 x[BATCH_TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++) x[n] = load_shared(tokens + n * 512);
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++) weights.multiply(c[n], d[n], x[n], true);
  }
};

// By a block: its tiles of a stage, by group of rows. `await` and `meanwhile` as above, each called once. Of outputs
// `output` and 8 more of a row, `outputs.ask(row, output)` asks for what does not depend on the stage before, and
// `outputs.write` takes that and the sums, by all threads, for rows that are `present`.
template <class Await, class Meanwhile, class Outputs>
__device__ __forceinline__ void multiply_stage(const BatchPass& pass, const Layer& layer, int stage,
                                               const BatchTables (&tables)[TOKEN_GROUPS], BatchMemory& memory,
                                               Await await, Meanwhile meanwhile, const Outputs& outputs) {
  const int blocks = pass.blocks, warp = threadIdx.x / 32;
  const StageInput input = stage_input(*pass.scratch, stage);
  // a thread has two outputs of a tile, of one row
  const int output = threadIdx.x % 8, token = threadIdx.x / 8;
  static_assert(THREADS >= 8 * BATCH_TOKENS, "a thread to each row's two outputs");
  bool awaited = false;
#pragma unroll 1
  for (int group = 0; group * BATCH_TOKENS < pass.rows; group++) {
    const auto& of_block = tables[group].stage[stage];
    if (!of_block.tiles) continue;
    const auto& of_warp = of_block.warp[warp];
    const int first_row = group * BATCH_TOKENS, row = min(first_row + token, pass.rows - 1);
    BatchProduct product{memory, input.first + first_row * input.width, input.width, pass.rows - first_row};
    int slot = of_warp.slot, next = of_block.first * 16 + output;
    auto asked = outputs.ask(row, next);
    __syncthreads();  // nobody reads any more what lies there
    if (!of_warp.count) product.keep(slot);
    product.run(
        layer.matrices[stage], of_block.columns, of_warp.walk, of_warp.count, blocks,
        [&] {
          if (!awaited) await();
        },
        [&] {
          if (!awaited) meanwhile();
          awaited = true;
        },
        [&](int) { product.keep(slot++); });
    __syncthreads();
    if (token >= BATCH_TOKENS) continue;
#pragma unroll 1
    for (int i = 0; i < of_block.tiles; i++) {
      const int2 parts = of_block.parts[i];
      const float2 v = product.sum(parts.x, parts.y, output, token);
      const int now = next;
      const auto of_now = asked;
      next += blocks * 16;
      if (i + 1 < of_block.tiles) asked = outputs.ask(row, next);
      outputs.write(row, now, v, of_now, first_row + token < pass.rows);
    }
  }
  if (awaited) return;
  await();
  meanwhile();
}
