// A block's shared memory: what is left of it is the ring.
#pragma once
#include "ring.cuh"

constexpr int INPUT = larger(HIDDEN, ATTENTION) + 32;  // a row of a stage's input; 32 more against bank conflicts
constexpr int HEAD_ROW = HEAD + 8, KEY_ROW = KEYS + 8;
constexpr int QKV_TILES_OF_BLOCK = divided_up(QKV_TILES, MIN_BLOCKS);
constexpr int O_TILES_OF_BLOCK = divided_up(O_TILES, MIN_BLOCKS);  // and of down
constexpr int GATE_UP_TILES_OF_BLOCK = divided_up(GATE_UP_TILES, MIN_BLOCKS);

// Members of a union belong to different steps of a layer, between which all of the block's warps meet (sync_block).
template <int N>
struct Shared {
  static constexpr int QUERY_ROWS = 16;  // two tokens of eight heads
  int chunk_shift[MAX_ROWS];             // by row, keys to a chunk of attention, as a power of two
  int token[N], position[N];             // of the pass's rows, in this step
  int step;                              // of the pass
  unsigned going_on;                     // rows that take another step
  float accepted[N];                     // probability that the tokens chosen for a row so far are accepted
  int filled_from[N];                    // by row, the first layer that it skips and whose cache is filled
  Layer layers[LAYERS];
  Tables tables;
  RingState ring[WARPS];
  unsigned long long barriers[WARPS][PIECES_UNDER_WAY];
  float rotary[SEDAC_ROTARY_TABLES][N][2][ROTARY / 2];  // cos, sin
  // Of the block's tiles, by who publishes them: the residual that O or down is added to, and the layer's input.
  float before[O_TILES_OF_BLOCK][N][16], layer_input[O_TILES_OF_BLOCK][N][16];
  float output[SEDAC_POST_NORMS ? O_TILES_OF_BLOCK : 1][N][16];  // before its norm
  // Of rows: the factor of the last norm and of the one before; by what the stage's input is to be scaled.
  float factor[MAX_ROWS], factor_before[MAX_ROWS], scale[MAX_ROWS], stability[MAX_ROWS], output_factor[MAX_ROWS];
  // Of rows, where exits are decided: the last stabilities, by depth modulo 3; what is measured beside.
  float stabilities[3][MAX_ROWS], exit_signals[MAX_ROWS][EXIT_SIGNALS];
  // Column blocks whose activations a warp asks for at once in down: no more than it usually has, since a load that is
  // not wanted costs as many instructions as one that is.
  static constexpr int MOST_AT_ONCE = REGISTERS_MOVE ? (N < 4 ? 24 : N < 8 ? 16 : 8) : N < 4 ? 16 : 32 / N;
  static constexpr int GROUP_STEP = larger(PIECE, 8 / N), WHOLE_SHARE = divided_up(DOWN_SHARE, GROUP_STEP) * GROUP_STEP;
  static constexpr int GROUP = WHOLE_SHARE < MOST_AT_ONCE ? WHOLE_SHARE : MOST_AT_ONCE;
  static_assert(GROUP % PIECE == 0 && GROUP * N % 8 == 0, "whole pieces, and whole loads of a warp");
  // The input of QKV, attention's keys (until weigh's last sync_block), the input of O, that of gate_up, activations.
  union {
    alignas(16) half input[N][INPUT];
    alignas(16) half keys[KEYS][HEAD_ROW];
    alignas(16) half activations[WARPS][GROUP][N][32];
  };
  // Rows that an exit head reads at a time.
  static constexpr int EXIT_ROWS = N < 8192 / HIDDEN ? N : larger(1, 8192 / HIDDEN);
  // The rest of attention, then gate_up's sums, then what exit heads take. Those of the other stages are apart: some
  // warps still read QKV's when others attend, and gate_up's when others multiply in down.
  union {
    struct {
      alignas(16) half values[KEYS][HEAD_ROW];
      alignas(16) half queries[QUERY_ROWS][HEAD_ROW];
      alignas(16) half probabilities[QUERY_ROWS][KEY_ROW];
      alignas(16) float maxima[QUERY_ROWS][KEY_TILES], totals[QUERY_ROWS][KEY_TILES], running[2][QUERY_ROWS];
    };
    alignas(16) float gate_up_sums[WARPS + GATE_UP_TILES_OF_BLOCK][128];
    struct {
      alignas(16) half normed[EXIT_ROWS][HIDDEN];
      float4 exit_logits[EXIT_ROWS][WARPS];
    };
  };
  alignas(16) float sums[WARPS + larger(QKV_TILES_OF_BLOCK, O_TILES_OF_BLOCK)][128];
};
template <int N>
constexpr int RING_START = (sizeof(Shared<N>) + 127) / 128 * 128;
constexpr int MOST_SLOTS = 24 * 1024 / BLOCK_BYTES;
template <int N>
constexpr int RING_FIT = (SHARED_LIMIT - RING_START<N>) / (WARPS * BLOCK_BYTES);
template <int N>
constexpr int RING_SLOTS = RING_FIT<N> > MOST_SLOTS ? MOST_SLOTS : RING_FIT<N>;
static_assert(RING_FIT<MAX_ROWS> >= PIECE, "shared memory is too small");
template <int N>
constexpr int SHARED_BYTES = RING_START<N> + RING_SLOTS<N> * WARPS * BLOCK_BYTES;
