// What a block of a small batch keeps all along: what it and its warps have of each stage, whatever the layer.
#pragma once
#include "batch_factors.cuh"

// Column blocks of a warp, one after another: from one of a tile on, then those of the tile `stride` later.
struct ColumnWalk {
  int tile, column;
  __device__ __forceinline__ void advance(int columns, int stride) {
    if (++column == columns) column = 0, tile += stride;
  }
};

// What a block has of each stage, and its warps.
struct BatchTables {
  struct {
    int tiles, first, columns;  // the first tile, which others follow by the number of blocks; column blocks of a tile
    int2 parts[MAX_TILES];      // of each of the tiles: the first slot of its sums, how many
    struct {
      ColumnWalk walk;
      int count;  // column blocks
      int slot;   // of its first sum
    } warp[WARPS];
  } stage[STAGES];

  // By a block.
  __device__ __forceinline__ void make(int block, int blocks) {
    static_assert(STAGES * MAX_TILES <= THREADS && STAGES * WARPS <= THREADS, "a thread to each entry");
    const int i = threadIdx.x;
    if (i < STAGES * MAX_TILES) make_parts(i / MAX_TILES, i % MAX_TILES, block, blocks);
    if (i < STAGES * WARPS) make_walk(i / WARPS, i % WARPS, block, blocks);
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void make_parts(int of, int index, int block, int blocks) {
    const StageShape shape = stage_shape(of, block, blocks);
    const int tiles = tile_count(shape.first, shape.tiles, blocks);
    if (!index) stage[of].tiles = tiles, stage[of].first = shape.first, stage[of].columns = shape.columns;
    if (index < tiles) stage[of].parts[index] = parts_of_tile(index, tiles, shape.columns);
  }
  __device__ __forceinline__ void make_walk(int of, int warp, int block, int blocks) {
    const StageShape shape = stage_shape(of, block, blocks);
    const int all = tile_count(shape.first, shape.tiles, blocks) * shape.columns;
    const int start = share_start(warp, all), index = max(min(start, all - 1), 0) / shape.columns;
    stage[of].warp[warp] = {{shape.first + index * blocks, start - index * shape.columns},
                            share_start(warp + 1, all) - start,
                            warp + index};
  }
};

// Rows beyond BATCH_TOKENS are those of other blocks, since many have nothing to do in most stages of small models: by
// the block of the chain whose tiles a block has for such a group.
__device__ __forceinline__ int chain_block(int group, int block, int blocks) {
  return (block + group * (blocks / TOKEN_GROUPS)) % blocks;
}

struct BatchShared {
  Layer layers[LAYERS];
  BatchTables tables[TOKEN_GROUPS];
  RowFactors factors;
};

// Dynamic shared memory that is left for a stage: variables lie beside it, too.
constexpr int BATCH_STAGE_LIMIT = SHARED_LIMIT - sizeof(BatchShared) - sizeof(TileSums) - 1024;
