// Products of many tokens, as prefill has them: a matrix times up to BATCH_ROWS, in the order of the chain's sums.
//
// In the chain a tile's sum is that of the parts which the warps of its block have (tables.cuh), so a sum here is cut
// at the same columns. Weights are read in their packed order, which is that of the mma's lanes.
//
// The four products of a layer are one kernel and little code: code that was not fetched lately takes 6 cycles an
// instruction.
#pragma once
#include "batch_outputs.cuh"

// What a block has of a product: some tiles of weights and some tokens, of which a warp has a quarter and a half. Small
// models have too few tiles to keep all multiprocessors busy with large pieces, and wait for the longest chain of mmas.
// (256 tokens of SmolLM2's shape with eight tiles and 64 tokens: 2702 us instead of 1760, by a build with three
// inputs.)
constexpr bool FEW_TILES = O_TILES < USUAL_BLOCKS;
constexpr int PRODUCT_TILES = FEW_TILES ? 4 : 8, PRODUCT_TOKENS = FEW_TILES ? 32 : 64;
constexpr int WARP_TILES = PRODUCT_TILES / 4, TOKEN_TILES = PRODUCT_TOKENS / 2 / 8;
static_assert(WARPS == 4 * 2, "a warp to each quarter of the tiles and half of the tokens");
// Column blocks that are copied together.
constexpr int PRODUCT_COLUMNS = FEW_TILES ? 4 : 2;

struct ProductInput {
  alignas(16) char weights[PRODUCT_TILES][PRODUCT_COLUMNS * BLOCK_BYTES];
  alignas(16) half tokens[PRODUCT_COLUMNS][PRODUCT_TOKENS][32];
};
struct ProductSums {
  float sums[PRODUCT_TOKENS][PRODUCT_TILES * 16 + 4];  // 4 more against bank conflicts
  float scale[PRODUCT_TOKENS];
};
// Inputs that there is room for; with so few, two or three blocks share a multiprocessor where shared memory is not
// scarce. (Three inputs and two blocks also for few tiles: 256 tokens of SmolLM2's shape 1775 us instead of 1667. Two
// inputs of three column blocks for Mistral-7B's: 22.2 ms instead of 20.1.)
constexpr int INPUTS_FIT = (SHARED_LIMIT - sizeof(ProductSums)) / sizeof(ProductInput), MOST_INPUTS = FEW_TILES ? 2 : 3;
constexpr int PRODUCT_COPIES = INPUTS_FIT < MOST_INPUTS ? INPUTS_FIT : MOST_INPUTS;
constexpr int BLOCKS_TOGETHER = FEW_TILES ? 3 : 2;
constexpr int PREFILL_PRODUCTS_BYTES = PRODUCT_COPIES * sizeof(ProductInput) + sizeof(ProductSums);

struct Product {
  const BatchPass& pass;
  const Layer& layer;
  unsigned inputs;  // shared address of PRODUCT_COPIES of ProductInput
  ProductSums& shared;
  int stage;
  StageShape shape;
  int warp_tile, warp_token;  // the warp's first of each, of the block's
  // From where a thread copies, 16 bytes at a time, in the next step.
  static constexpr int TILE_COPIES = PRODUCT_COLUMNS * BLOCK_BYTES / 16, TOKEN_COPIES = PRODUCT_COLUMNS * 4;
  static constexpr int WEIGHT_LOADS = divided_up(PRODUCT_TILES * TILE_COPIES, THREADS),
                       TOKEN_LOADS = PRODUCT_TOKENS * TOKEN_COPIES / THREADS;
  const char *weights, *tokens[TOKEN_LOADS];
  unsigned offsets[WEIGHT_LOADS];
  float c[WARP_TILES][TOKEN_TILES][4] = {}, d[WARP_TILES][TOKEN_TILES][4] = {};

  __device__ __forceinline__ Product(const BatchPass& pass, const Layer& layer, int stage, unsigned char* memory)
      : pass(pass),
        layer(layer),
        inputs(shared_address(memory)),
        shared(*reinterpret_cast<ProductSums*>(memory + PRODUCT_COPIES * sizeof(ProductInput))),
        stage(stage),
        shape(stage_shape(stage, 0, 1)) {
    const int warp = threadIdx.x / 32;
    warp_tile = warp % 4 * WARP_TILES, warp_token = warp / 4 * TOKEN_TILES * 8;
    find_weights();
    find_tokens();
    if (threadIdx.x < PRODUCT_TOKENS) shared.scale[threadIdx.x] = pass.scratch->scale[row_of(threadIdx.x)];
  }

  __device__ __forceinline__ void run() {
    const int steps = divided_up(shape.columns, PRODUCT_COLUMNS);
#pragma unroll 1
    for (int step = 0; step < PRODUCT_COPIES - 1; step++) copy(step);
    TileParts parts[WARP_TILES];
    int ends[WARP_TILES];
#pragma unroll
    for (int j = 0; j < WARP_TILES; j++) {
      parts[j] = {tile_of(warp_tile + j), shape, pass.blocks};
      ends[j] = parts[j].end(0);
    }
    unsigned later = 0;  // tiles of whose sum a part has ended, a bit each
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      wait_for_copies<PRODUCT_COPIES - 2>();
      __syncthreads();
      copy(step + PRODUCT_COPIES - 1);
      multiply(step, parts, ends, later);
    }
    __syncthreads();
    write();
  }

 private:
  static constexpr unsigned TOKENS_AT = sizeof(ProductInput::weights);
  __device__ __forceinline__ unsigned input_of(int step) const {
    return inputs + step % PRODUCT_COPIES * sizeof(ProductInput);
  }
  __device__ __forceinline__ int row_of(int token) const {
    return min(blockIdx.x * PRODUCT_TOKENS + token, pass.rows - 1);
  }
  __device__ __forceinline__ int tile_of(int index) const {
    return min(blockIdx.y * PRODUCT_TILES + index, shape.tiles - 1);
  }
  // Tiles and rows beyond the last are copies of it.
  __device__ __forceinline__ void find_weights() {
    const int first = tile_of(0);
    weights = layer.matrices[stage] + static_cast<size_t>(first) * shape.columns * BLOCK_BYTES;
#pragma unroll
    for (int k = 0; k < WEIGHT_LOADS; k++) {
      const int i = threadIdx.x + k * THREADS;
      offsets[k] = (tile_of(i / TILE_COPIES) - first) * shape.columns * BLOCK_BYTES + i % TILE_COPIES * 16;
    }
  }
  __device__ __forceinline__ void find_tokens() {
    const StageInput input = stage_input(*pass.scratch, stage);
#pragma unroll
    for (int k = 0; k < TOKEN_LOADS; k++) {
      const int i = threadIdx.x + k * THREADS;
      tokens[k] =
          reinterpret_cast<const char*>(input.first + row_of(i / TOKEN_COPIES) * input.width) + i % TOKEN_COPIES * 16;
    }
  }

  // Asks for the weights and tokens of a step, if there is one.
  __device__ __forceinline__ void copy(int step) {
    const unsigned to = input_of(step);
    const int blocks = min(shape.columns - step * PRODUCT_COLUMNS, PRODUCT_COLUMNS);
    const int part = threadIdx.x % TOKEN_COPIES, token = threadIdx.x / TOKEN_COPIES;
    const unsigned token_to = to + TOKENS_AT + (part / 4 * PRODUCT_TOKENS + token) * 64 + part % 4 * 16;
#pragma unroll
    for (int k = 0; k < WEIGHT_LOADS; k++) {
      const int i = threadIdx.x + k * THREADS;
      if (i < PRODUCT_TILES * TILE_COPIES && i % TILE_COPIES < blocks * (BLOCK_BYTES / 16))
        copy_16(to + i * 16, weights + offsets[k]);
    }
    weights += PRODUCT_COLUMNS * BLOCK_BYTES;
#pragma unroll
    for (int k = 0; k < TOKEN_LOADS; k++) {
      if (part < blocks * 4) copy_16(token_to + k * (THREADS / TOKEN_COPIES) * 64, tokens[k]);
      tokens[k] += PRODUCT_COLUMNS * 64;
    }
    end_copies();
  }

  __device__ __forceinline__ void multiply(int step, TileParts (&parts)[WARP_TILES], int (&ends)[WARP_TILES],
                                           unsigned& later) {
    const unsigned from = input_of(step);
    const int lane = threadIdx.x % 32, blocks = min(shape.columns - step * PRODUCT_COLUMNS, PRODUCT_COLUMNS);
    const LanePlace place(from + warp_tile * PRODUCT_COLUMNS * BLOCK_BYTES, lane);
    const unsigned tokens = from + TOKENS_AT + (warp_token + lane / 4) * 64 + lane % 4 * 16;
#pragma unroll
    for (int block = 0; block < PRODUCT_COLUMNS; block++) {
      if (block >= blocks) break;
      uint4 x[TOKEN_TILES];
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++) x[n] = load_shared(tokens + (block * PRODUCT_TOKENS + n * 8) * 64);
      const int column = step * PRODUCT_COLUMNS + block + 1;
      LaneWeights<WEIGHT_BITS> of_tile[WARP_TILES];
#pragma unroll
      for (int j = 0; j < WARP_TILES; j++) of_tile[j].load(place, (j * PRODUCT_COLUMNS + block) * BLOCK_BYTES);
#pragma unroll
      for (int j = 0; j < WARP_TILES; j++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) of_tile[j].multiply(c[j][n], d[j][n], x[n], true);
#pragma unroll
      for (int j = 0; j < WARP_TILES; j++) {
        if (column < ends[j] && column < shape.columns) continue;
        end_part(j, later >> j & 1);
        later |= 1 << j;
        if (column < shape.columns) ends[j] = parts[j].end(column);
      }
    }
  }

  // Adds the part of a tile's sum that ends to those before it. A thread has rows lane / 4 and 8 more of a tile, and
  // two of each eight tokens.
  __device__ __forceinline__ void end_part(int j, bool later) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float& sum =
            shared.sums[warp_token + n * 8 + lane % 4 * 2 + q % 2][(warp_tile + j) * 16 + q / 2 * 8 + lane / 4];
        sum = (later ? sum : 0.f) + (c[j][n][q] + d[j][n][q]);
        c[j][n][q] = d[j][n][q] = 0;
      }
  }

  // A thread has a pair of outputs, those that are gate and up where these meet, of some of the rows.
  __device__ __forceinline__ void write() const {
    constexpr int PAIRS = PRODUCT_TILES * 8;
    const int pair = threadIdx.x % PAIRS, tile = blockIdx.y * PRODUCT_TILES + pair / 8;
    const int of_block = pair / 8 * 16 + pair % 8, output = tile * 16 + pair % 8;
    if (tile >= shape.tiles) return;
    const ProductOutputs outputs(pass, layer, stage);
    const float2 bias = outputs.bias_of(output);
    for (int token = threadIdx.x / PAIRS; token < PRODUCT_TOKENS; token += THREADS / PAIRS) {
      const int row = blockIdx.x * PRODUCT_TOKENS + token;
      if (row >= pass.rows) break;
      const float2 v = make_float2(shared.sums[token][of_block], shared.sums[token][of_block + 8]);
      outputs.write(row, tile * 8 + pair % 8, output, v, shared.scale[token], bias);
    }
  }
};
