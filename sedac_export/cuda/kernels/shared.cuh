// A block's shared memory: what is left of it is the ring.
#pragma once
#include "ring.cuh"

constexpr int INPUT = larger(HIDDEN, ATTENTION) + 32;  // a row of a stage's input; 32 more against bank conflicts
constexpr int HEAD_ROW = HEAD + 8, KEY_ROW = KEYS + 8;
constexpr int QKV_TILES_OF_BLOCK = divided_up(QKV_TILES, MIN_BLOCKS),
              O_TILES_OF_BLOCK = divided_up(O_TILES, MIN_BLOCKS);
constexpr int GATE_UP_TILES_OF_BLOCK = divided_up(GATE_UP_TILES, MIN_BLOCKS);
constexpr int DOWN_TILES_OF_BLOCK = divided_up(DOWN_TILES, MIN_BLOCKS);

// Members of a union belong to different steps of a layer, between which all of the block's warps meet (sync_block).
template <int N>
struct Shared {
  static constexpr int QUERY_ROWS = 16;  // two tokens of eight heads
  int chunk_shift;                       // keys to a chunk of attention, as a power of two
  Layer layers[LAYERS];
  Tables tables;
  RingState ring[WARPS];
  unsigned long long barriers[WARPS][PIECES_UNDER_WAY];
  alignas(16) float segments[4][MAX_ROWS * WARPS];
  float rotary[SEDAC_ROTARY_TABLES][N][2][ROTARY / 2];                               // cos, sin
  float before_o[O_TILES_OF_BLOCK][N][16], before_down[DOWN_TILES_OF_BLOCK][N][16];  // residual that a tile is added to
  // Activations that a warp multiplies in down, at most GROUP pieces at once.
  static constexpr int GROUP = N < 4 ? 4 : N < 8 ? 2 : 1;
  // The input of QKV, attention's keys (until weigh's last sync_block), the input of O, that of gate_up, activations.
  union {
    alignas(16) half input[N][INPUT];
    alignas(16) half keys[KEYS][HEAD_ROW];
    alignas(16) half activations[WARPS][GROUP][PIECE][N][32];
  };
  // The rest of attention, then gate_up's sums. Those of the other stages are apart: some warps still read QKV's when
  // others attend, and gate_up's when others multiply in down.
  union {
    struct {
      alignas(16) half values[KEYS][HEAD_ROW];
      alignas(16) half queries[QUERY_ROWS][HEAD_ROW];
      alignas(16) half probabilities[QUERY_ROWS][KEY_ROW];
      alignas(16) float maxima[QUERY_ROWS][KEY_TILES], totals[QUERY_ROWS][KEY_TILES], running[2][QUERY_ROWS];
    };
    alignas(16) float gate_up_sums[WARPS + GATE_UP_TILES_OF_BLOCK][128];
  };
  alignas(16) float sums[WARPS + larger(QKV_TILES_OF_BLOCK, DOWN_TILES_OF_BLOCK)][128];
};
template <int N>
constexpr int RING_START = (sizeof(Shared<N>) + 127) / 128 * 128;
template <int N>
constexpr int RING_FIT = (SHARED_LIMIT - RING_START<N>) / (WARPS * BLOCK_BYTES);
template <int N>
constexpr int RING_SLOTS = RING_FIT<N> > 24 ? 24 : RING_FIT<N>;
static_assert(RING_FIT<MAX_ROWS> >= PIECE, "shared memory is too small");
template <int N>
constexpr int SHARED_BYTES = RING_START<N> + RING_SLOTS<N> * WARPS * BLOCK_BYTES;
