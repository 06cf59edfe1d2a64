// The model's shape, and how its matrices are cut into tiles.
//
// Given at compile time: SEDAC_HIDDEN, SEDAC_HEADS, SEDAC_KEY_VALUE_HEADS, SEDAC_HEAD_SIZE, SEDAC_ROTARY_SIZE,
// SEDAC_INTERMEDIATE, SEDAC_LAYERS, SEDAC_VOCABULARY, SEDAC_ROTARY_TABLES, SEDAC_GELU, SEDAC_QUERY_KEY_NORM,
// SEDAC_POST_NORMS, SEDAC_NORM_EPSILON, SEDAC_ATTENTION_SCALE, SEDAC_ATTENTION_SOFTCAP, SEDAC_LOGITS_SOFTCAP,
// SEDAC_EMBEDDING_SCALE, SEDAC_WEIGHT_BITS, SEDAC_ZERO_POINTS.
#pragma once
#include "abi.cuh"
#include "gpu_limits.cuh"

constexpr int HIDDEN = SEDAC_HIDDEN, HEADS = SEDAC_HEADS, KV_HEADS = SEDAC_KEY_VALUE_HEADS, HEAD = SEDAC_HEAD_SIZE;
constexpr int ROTARY = SEDAC_ROTARY_SIZE, INNER = SEDAC_INTERMEDIATE, LAYERS = SEDAC_LAYERS,
              VOCABULARY = SEDAC_VOCABULARY;
constexpr int QKV = (HEADS + 2 * KV_HEADS) * HEAD, ATTENTION = HEADS * HEAD, GROUP = HEADS / KV_HEADS;

__host__ __device__ constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// With 16 warps a thread has 128 registers, which spill; spills miss in the L1 that the ring leaves (828 us a token of
// SmolLM2's shape against 440).
constexpr int WARPS = 8, THREADS = WARPS * 32;
// Where registers move, one warp more sends weights, see copies.cuh; it has three idle ones beside it, since registers
// move between groups of four.
constexpr int ALL_THREADS = THREADS + (REGISTERS_MOVE ? 128 : 0);

// Blocks of 32 columns, of each matrix.
constexpr int HIDDEN_COLUMNS = HIDDEN / 32, ATTENTION_COLUMNS = ATTENTION / 32, INNER_COLUMNS = INNER / 32;

// Tiles of 16 weight rows; one of gate_up has 8 rows of gate and the 8 of up that they meet.
constexpr int QKV_TILES = QKV / 16, O_TILES = HIDDEN / 16, GATE_UP_TILES = INNER / 8, DOWN_TILES = HIDDEN / 16;
constexpr int HEAD_TILES = divided_up(VOCABULARY, 16);

// Every block has a tile of gate_up: by it the flags of words.cuh are safe. No block has more than MAX_TILES of a
// stage: 16, or with wide models what the 108 multiprocessors of an A100 need.
constexpr int MAX_BLOCKS = GATE_UP_TILES < 256 ? GATE_UP_TILES : 256;
constexpr int MOST_TILES = larger(GATE_UP_TILES, larger(QKV_TILES, DOWN_TILES));
constexpr int MAX_TILES = larger(16, divided_up(MOST_TILES, 108)), MIN_BLOCKS = divided_up(MOST_TILES, MAX_TILES);

// Sizes that depend on the number of blocks are tuned for grids of about this many, and right for any.
constexpr int USUAL_BLOCKS = 132;
// The most column blocks that a warp then multiplies.
constexpr int warp_share_of(int tiles, int columns) {
  return divided_up(divided_up(tiles, USUAL_BLOCKS) * columns, WARPS);
}
constexpr int QKV_SHARE = warp_share_of(QKV_TILES, HIDDEN_COLUMNS), O_SHARE = warp_share_of(O_TILES, ATTENTION_COLUMNS),
              GATE_UP_SHARE = warp_share_of(GATE_UP_TILES, HIDDEN_COLUMNS),
              DOWN_SHARE = warp_share_of(DOWN_TILES, INNER_COLUMNS);
constexpr int LARGEST_SHARE = larger(larger(QKV_SHARE, O_SHARE), larger(GATE_UP_SHARE, DOWN_SHARE));

// What is saved at an exit: the hidden state, and the factors of the norms before and after it (residual.cuh).
constexpr int SAVED = HIDDEN + 4;

// Tiles of the residual whose sums a lane adds.
constexpr int TILES_OF_LANE = divided_up(O_TILES, 32);

// Keys that attention takes at a time, and the most partial sums of a row and head: more where key-value heads are few,
// so that more blocks have work in a long cache.
constexpr int KEYS = HEAD > (REGISTERS_MOVE ? 64 : 48) ? 64 : 128, KEY_TILES = KEYS / 16;
constexpr int MAX_CHUNKS = KV_HEADS > 4 ? 16 : KV_HEADS > 2 ? 32 : 64;

// Outputs of the first matrix of the entropy probe, and of an exit head's learned probe.
constexpr int PROBE_WIDTH = 64, LEARNED_WIDTH = 64;

static_assert(MAX_BLOCKS >= MAX_ROWS, "a block saves a row");
static_assert(HIDDEN % 32 == 0 && ATTENTION % 32 == 0 && INNER % 32 == 0 && QKV % 16 == 0, "matrices of whole tiles");
static_assert(HEADS % KV_HEADS == 0 && GROUP <= 8, "at most 8 query heads to a key-value head");
static_assert(HEAD % 16 == 0 && ROTARY % 4 == 0 && ROTARY <= HEAD, "head size");
static_assert(!SEDAC_QUERY_KEY_NORM || 32 % (HEAD / 4) == 0, "norms of heads are sums over lanes");

// Floats of a sector of L2. Blocks that write to one sector hold each other up, so what each writes of a layer lies in
// sectors of its own. (16 bytes from each of 132 blocks were read by all after 1054 ns where two shared a sector, and
// after 907 where none did. Us a token for one row and for eight: SmolLM2's shape 417 and 575 before, 397 and 545
// since; Qwen2.5-0.5B's 514 and 700, 512 and 676.)
constexpr int SECTOR = 8;

// Scratch of one row, in floats: what blocks exchange. Rows lie one after another.
constexpr int SCRATCH_QKV = 0;
// The residual stream after attention, and after the layer: the residual, then the next stage's input as halves, then
// each tile's three sums, then each tile's sum of squares before a norm that comes before adding.
constexpr int STREAM_INPUT = HIDDEN, STREAM_SUMS = STREAM_INPUT + HIDDEN / 2,
              STREAM_OUTPUT_SUMS = STREAM_SUMS + O_TILES * SECTOR,
              STREAM_WORDS = STREAM_OUTPUT_SUMS + (SEDAC_POST_NORMS ? O_TILES * SECTOR : 0);
constexpr int SCRATCH_AFTER_ATTENTION = SCRATCH_QKV + QKV;
constexpr int SCRATCH_AFTER_LAYER = SCRATCH_AFTER_ATTENTION + STREAM_WORDS;
constexpr int SCRATCH_ACTIVATION = SCRATCH_AFTER_LAYER + STREAM_WORDS;          // [tile of gate_up] eight halves
constexpr int SCRATCH_ATTENTION = SCRATCH_ACTIVATION + GATE_UP_TILES * SECTOR;  // halves
constexpr int SCRATCH_PARTIAL = SCRATCH_ATTENTION + ATTENTION / 2;              // [head][chunk][head size]
constexpr int SCRATCH_SOFTMAX = SCRATCH_PARTIAL + HEADS * MAX_CHUNKS * HEAD;    // [head][chunk]{maximum, sum}
constexpr int SCRATCH_PROBE = SCRATCH_SOFTMAX + HEADS * MAX_CHUNKS * SECTOR;
constexpr int SCRATCH_ROW = (SCRATCH_PROBE + 2 * PROBE_WIDTH + 31) / 32 * 32;
static_assert(QKV % SECTOR == 0 && STREAM_SUMS % SECTOR == 0 && SCRATCH_SOFTMAX % SECTOR == 0, "whole sectors");
// After the rows: each block's highest logit of each row, and its first of each row's race, see head.cuh.
constexpr long long SCRATCH_HIGHEST = 1ll * MAX_ROWS * SCRATCH_ROW;
// What blocks exchange of a row's exit, each float beside a number that no other step and depth has, so that nobody has
// to clear it: what the lens gives, the outputs of the learned probe's first matrix, and four numbers of each block.
constexpr long long SCRATCH_EXITS = SCRATCH_HIGHEST + 2 * 8ll * MAX_BLOCKS * MAX_ROWS;
constexpr int EXIT_LEARNED = 2 * HIDDEN, EXIT_BLOCKS = EXIT_LEARNED + 2 * LEARNED_WIDTH,
              EXIT_ROW = EXIT_BLOCKS + 8 * MAX_BLOCKS;
// And keys and values of the layers that a row skips, beside the number of the step: see cache_fill.cuh.
constexpr int KEY_VALUES = 2 * KV_HEADS * HEAD;
constexpr long long SCRATCH_FILLS = SCRATCH_EXITS + 1ll * MAX_ROWS * EXIT_ROW, FILL_ROW = 2ll * LAYERS * KEY_VALUES;
constexpr long long SCRATCH_BYTES = (SCRATCH_FILLS + MAX_ROWS * FILL_ROW) * 4;
