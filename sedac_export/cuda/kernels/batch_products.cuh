// Products of some tokens, as decoding several sequences has them: the chain's blocks and warps, each with the columns
// that it has there (tables.cuh), and BATCH_TOKENS tokens.
//
// So every block reads as much of the weights, all of them at once, and a warp's tokens come along with its weights:
// with so many, they are more than shared memory holds.
#pragma once
#include "batch_outputs.cuh"

constexpr int BATCH_TOKENS = 32, BATCH_TOKEN_TILES = BATCH_TOKENS / 8;

// A column block of a tile, and the tokens' numbers that it meets.
struct BatchInput {
  alignas(16) char weights[BLOCK_BYTES];
  alignas(16) half tokens[BATCH_TOKENS][32];
};
// A warp's sums of a tile, as the mma's lanes have them.
using BatchSums = float[BATCH_TOKEN_TILES * 4][32];

constexpr int BATCH_SUMS = MAX_TILES + WARPS;  // of a block: see cut_stage
constexpr int BATCH_INPUTS_FIT = (SHARED_LIMIT - BATCH_SUMS * sizeof(BatchSums)) / (WARPS * sizeof(BatchInput));
constexpr int BATCH_INPUTS = BATCH_INPUTS_FIT < 8 ? BATCH_INPUTS_FIT : 8;  // of a warp, under way
static_assert(BATCH_INPUTS >= 2, "shared memory is too small for products of batches");

struct BatchMemory {
  BatchInput inputs[WARPS][BATCH_INPUTS];
  BatchSums sums[BATCH_SUMS];
};
constexpr int BATCH_PRODUCT_BYTES = sizeof(BatchMemory);

// Column blocks of a warp, one after another: from one of a tile on, then those of the tile `stride` later.
struct ColumnWalk {
  int tile, column;
  __device__ __forceinline__ void advance(int columns, int stride) {
    if (++column == columns) column = 0, tile += stride;
  }
};

struct BatchProduct {
  BatchMemory& memory;
  const half* tokens;  // of the first row
  int width, rows;     // of a row; rows that there are
  float c[BATCH_TOKEN_TILES][4] = {}, d[BATCH_TOKEN_TILES][4] = {};

  // Multiplies `count` column blocks of a matrix whose tiles have `columns`, and calls `end` with the number of a tile
  // where the warp's part of it has ended.
  template <class End>
  __device__ __forceinline__ void run(const char* matrix, int columns, ColumnWalk walk, int count, int stride,
                                      End end) {
    // weights do not depend on the kernel before, unlike the numbers that they meet
    ColumnWalk ahead = walk;
    for (int i = 0; i < min(BATCH_INPUTS - 1, count); i++, ahead.advance(columns, stride))
      copy_weights(i, matrix, columns, ahead);
    await_previous_kernel();
    ahead = walk;
#pragma unroll 1
    for (int i = 0; i < BATCH_INPUTS - 1; i++) {
      if (i < count) copy_tokens(i, ahead.column), ahead.advance(columns, stride);
      end_copies();
    }
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      wait_for_copies<BATCH_INPUTS - 2>();
      __syncwarp();
      const int next = i + BATCH_INPUTS - 1;  // over what was read in the step before
      if (next < count) {
        copy_weights(next % BATCH_INPUTS, matrix, columns, ahead);
        copy_tokens(next % BATCH_INPUTS, ahead.column);
        ahead.advance(columns, stride);
      }
      end_copies();
      multiply(i % BATCH_INPUTS);
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
    weights.load({shared_address(input(at).weights), lane}, 0);
    uint4 x[BATCH_TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++) x[n] = load_shared(tokens + n * 512);
#pragma unroll
    for (int n = 0; n < BATCH_TOKEN_TILES; n++) weights.multiply(c[n], d[n], x[n], true);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    batch_product(const __grid_constant__ BatchPass pass, int layer, int stage) {
  extern __shared__ __align__(128) unsigned char memory[];
  start_next_kernel();
  const int blocks = gridDim.y, block = blockIdx.y, warp = threadIdx.x / 32, first_row = blockIdx.x * BATCH_TOKENS;
  const StageShape shape = stage_shape(stage, block, blocks);
  const int tiles = tile_count(shape.first, shape.tiles, blocks), all = tiles * shape.columns;
  if (!tiles) return;
  const BatchScratch& scratch = *pass.scratch;
  const int width = stage == STAGE_DOWN ? INNER : larger(HIDDEN, ATTENTION);
  const half* from = (stage == STAGE_DOWN ? scratch.activations[0] : scratch.input[0]) + first_row * width;
  BatchProduct product{*reinterpret_cast<BatchMemory*>(memory), from, width, pass.rows - first_row};

  const int start = share_start(warp, all), end = share_start(warp + 1, all),
            index = min(start, all - 1) / shape.columns;
  const ColumnWalk walk{shape.first + index * blocks, start - index * shape.columns};
  const Layer& of = pass.layers[layer];
  if (start == end) product.keep(warp + index);
  product.run(of.matrices[stage], shape.columns, walk, end - start, blocks,
              [&](int tile) { product.keep(warp + tile / blocks); });
  __syncthreads();

  // a thread has two outputs of a tile, of one row
  const int output = threadIdx.x % 8, token = threadIdx.x / 8, row = first_row + token;
  static_assert(THREADS == 8 * BATCH_TOKENS, "a thread to each row's two outputs");
  if (row >= pass.rows) return;
  const ProductOutputs outputs(pass, of, stage);
  const float scale = scratch.scale[row];
#pragma unroll 1
  for (int i = 0; i < tiles; i++) {
    const int tile = shape.first + i * blocks;
    const int2 parts = parts_of_tile(i, tiles, shape.columns);
    const float2 v = product.sum(parts.x, parts.y, output, token);
    outputs.write(row, tile * 8 + output, tile * 16 + output, v, scale, outputs.bias_of(tile * 16 + output));
  }
}
