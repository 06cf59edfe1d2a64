// Who computes what: a block's tiles of each stage, and its warps' shares of them.
//
// Tiles go round the blocks: QKV and O from different blocks on, down from the last one on. The weights of a block's
// tiles of one stage are cut evenly among its warps, in pieces of up to PIECE column blocks of one tile, so that every
// warp streams as much. A tile that several warps share is the sum of their slots.
//
// The tables depend on the grid alone: `prepare` writes them once, when a model is loaded.
#pragma once
#include "blocks.cuh"

enum Stage { STAGE_QKV, STAGE_O, STAGE_GATE_UP, STAGE_DOWN, STAGES };

struct Piece {
  unsigned offset;          // in the packed matrix, in column blocks
  unsigned short column;    // first column block of the input
  unsigned char count : 4;  // column blocks; 0 for a warp without a share, whose slot is zero
  unsigned char stage : 4;
  unsigned char slot;  // where the sum goes, plus 1, when the warp's part of the tile ends here; or 0
};

constexpr int warp_share(int tiles, int columns) { return divided_up(tiles * columns, WARPS) + 1; }
constexpr int most_pieces(int tiles, int columns) {
  const int blocks = warp_share(divided_up(tiles, MIN_BLOCKS), columns);
  return divided_up(blocks, PIECE) + 2 * (blocks / columns) + 2;
}
constexpr int MAX_PIECES = most_pieces(QKV_TILES, HIDDEN_COLUMNS) + most_pieces(O_TILES, ATTENTION_COLUMNS) +
                           most_pieces(GATE_UP_TILES, HIDDEN_COLUMNS) + most_pieces(DOWN_TILES, INNER_COLUMNS);

struct alignas(16) Tables {
  Piece piece[WARPS][MAX_PIECES];
  int2 range[STAGES][WARPS];      // a warp's pieces of a stage: first, end
  int2 parts[STAGES][MAX_TILES];  // slots to sum for a tile: first, how many
  int2 tiles[STAGES];             // the block's: how many, the first; others follow by the number of blocks
  int4 last_head[WARPS];          // in the last round over the head's tiles: tile, first column, end, part | parts << 8
};

// Tiles first, first + blocks, and so on below `tiles`.
__device__ __forceinline__ int tile_count(int first, int tiles, int blocks) {
  return first < tiles ? (tiles - 1 - first) / blocks + 1 : 0;
}
// Where a warp's share of `columns` column blocks begins.
__device__ __forceinline__ int share_start(int warp, int columns) { return warp * columns / WARPS; }

struct StageShape {
  int tiles, columns;  // of one tile
  int first;           // the block's first tile
};
__device__ __forceinline__ StageShape stage_shape(int stage, int block, int blocks) {
  switch (stage) {
    case STAGE_QKV:
      return {QKV_TILES, HIDDEN_COLUMNS, block};
    case STAGE_O:
      return {O_TILES, ATTENTION_COLUMNS, (block + blocks - QKV_TILES % blocks) % blocks};
    case STAGE_GATE_UP:
      return {GATE_UP_TILES, HIDDEN_COLUMNS, block};
    default:
      return {DOWN_TILES, INNER_COLUMNS, blocks - 1 - block};
  }
}

// A warp's pieces of a stage, from `piece` on; returns their end. Run by one thread.
__device__ __forceinline__ int cut_stage(Tables& tables, int stage, int warp, int piece, int block, int blocks) {
  const StageShape shape = stage_shape(stage, block, blocks);
  const int count = tile_count(shape.first, shape.tiles, blocks), all = count * shape.columns;
  const int start = share_start(warp, all), end = share_start(warp + 1, all);
  tables.range[stage][warp].x = piece;
  int at = start;
  while (count && (at < end || (at == start && start == end))) {
    const int index = min(at, all - 1) / shape.columns, column = at - index * shape.columns;
    // down's input comes in groups of whole pieces, from the warp's first column block on
    const int most = stage == STAGE_DOWN ? PIECE - (at - start) % PIECE : PIECE;
    const int length = min(min(most, end - at), shape.columns - column);
    const int tile = shape.first + index * blocks;
    const bool ends = at + length == end || column + length == shape.columns;
    if (piece >= MAX_PIECES) __trap();
    tables.piece[warp][piece++] = {static_cast<unsigned>(tile * shape.columns + column),
                                   static_cast<unsigned short>(column), static_cast<unsigned char>(length),
                                   static_cast<unsigned char>(stage),
                                   static_cast<unsigned char>(ends ? warp + index + 1 : 0)};
    if (!length) break;
    at += length;
  }
  tables.range[stage][warp].y = piece;
  return piece;
}

// The slots to sum for the block's tile number `index` of `count`: first, how many.
__device__ __forceinline__ int2 parts_of_tile(int index, int count, int columns) {
  int warp = index * WARPS / count;  // the first that has a part of the tile
  warp += share_start(warp + 1, count * columns) <= index * columns;
  return make_int2(index + warp, divided_up(WARPS * (index + 1), count) - warp);
}

__device__ __forceinline__ void sum_parts(Tables& tables, int stage, int index, int block, int blocks) {
  const StageShape shape = stage_shape(stage, block, blocks);
  const int count = tile_count(shape.first, shape.tiles, blocks);
  if (!index) tables.tiles[stage] = make_int2(count, shape.first);
  if (index < count) tables.parts[stage][index] = parts_of_tile(index, count, shape.columns);
}

// The parts of a tile's sum.
struct TileParts {
  int before, columns_of_block;  // column blocks of its block's tiles, before it and in all
  int warp = 0;                  // that has the part

  TileParts() = default;
  __device__ __forceinline__ TileParts(int tile, const StageShape& shape, int blocks)
      : before(tile / blocks * shape.columns),
        columns_of_block(tile_count(tile % blocks, shape.tiles, blocks) * shape.columns) {}
  // Where the part ends that begins at `column`, in column blocks of the tile.
  __device__ __forceinline__ int end(int column) {
    int of_block;
#pragma unroll 1
    do of_block = share_start(++warp, columns_of_block);
    while (of_block <= before + column);
    return of_block - before;
  }
};

// The head: a tile to each warp in a round; in the last round warps share tiles.
__device__ __forceinline__ int4 last_head_share(int warp, int block, int blocks) {
  const int count = tile_count(block, HEAD_TILES, blocks), base = (count - 1) / WARPS * WARPS, rest = count - base;
  const int parts = min(WARPS / larger(rest, 1), HIDDEN_COLUMNS), index = warp / parts, part = warp % parts;
  const int start = part * HIDDEN_COLUMNS / parts, end = (part + 1) * HIDDEN_COLUMNS / parts;
  return make_int4(block + (base + index) * blocks, start, index < rest ? end : start, part | parts << 8);
}

extern "C" __global__ void prepare(char* all, int blocks) {
  Tables& tables = reinterpret_cast<Tables*>(all)[blockIdx.x];
  const int block = blockIdx.x, tid = threadIdx.x;
  if (tid < WARPS) {
    int piece = 0;
    for (int stage = 0; stage < STAGES; stage++) piece = cut_stage(tables, stage, tid, piece, block, blocks);
    tables.last_head[tid] = last_head_share(tid, block, blocks);
  }
  if (tid < STAGES * MAX_TILES) sum_parts(tables, tid / MAX_TILES, tid % MAX_TILES, block, blocks);
}
