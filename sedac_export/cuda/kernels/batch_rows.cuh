// What the kernels of a batch have in common, and heads.
#pragma once
#include "exits.cuh"
#include "heads.cuh"
#include "tables.cuh"

// Blocks that look for a row's token.
constexpr int CANDIDATE_BLOCKS = 16;

// Rows of a product that a small batch multiplies at once. Where shared memory is scarce it has no room for the sums of
// more.
constexpr int BATCH_TOKENS = SHARED_LIMIT < 128 * 1024 ? 16 : 32, TOKEN_GROUPS = SMALL_BATCH_ROWS / BATCH_TOKENS;

// A layer, and the one that follows; the last one's is not used.
struct LayerPair {
  const Layer &now, &next;
  int depth;  // layers up to the first one's end
};

// What is known of a logits row about which a rule decides.
struct RowExit {
  alignas(16) float layer_input[HIDDEN], hidden[HIDDEN];  // of the newest layer; what it exited with
  RowRule rule;
  Criterion seen[MAX_CRITERIA];
  int depth, criterion;  // at which it exited, 0 while it has not; which said so
  float factor_before;   // of the norm before its last one, there
};

// What the kernels of a batch exchange, by row.
struct BatchScratch {
  alignas(16) float residual[BATCH_ROWS][HIDDEN];
  alignas(16) float products[BATCH_ROWS][larger(QKV, HIDDEN)];  // of QKV, of O and of down
  alignas(16) half input[BATCH_ROWS][HIDDEN];                   // of QKV, and of gate and up
  alignas(16) half attended[BATCH_ROWS][ATTENTION];             // of O
  alignas(16) half queries[BATCH_ROWS][ATTENTION];
  alignas(16) half activations[BATCH_ROWS][INNER];  // the input of down
  // The factor of the last norm, and by what a product of its input is to be scaled: see residual.cuh.
  float factor[BATCH_ROWS], scale[BATCH_ROWS];
  // The sums of squares from which a block finds these itself, after O and after down: see batch_factors.cuh.
  float squares[2][SMALL_BATCH_ROWS][O_TILES];
  // By logits row: the head's input, and each block's highest logit and its first of the race, see head.cuh.
  alignas(16) half head_input[BATCH_LOGITS_ROWS][HIDDEN];
  int4 candidates[2][BATCH_LOGITS_ROWS][CANDIDATE_BLOCKS];
  int exit_of_row[BATCH_ROWS];  // an index of `exit`, -1 for none; of no meaning where no rule decides
  RowExit exit[BATCH_LOGITS_ROWS];
  unsigned long long arrived;  // see grid_barrier.cuh
};

// The input of a stage's product, [rows][width].
struct StageInput {
  const half* first;
  int width;
};
__device__ __forceinline__ StageInput stage_input(const BatchScratch& scratch, int stage) {
  switch (stage) {
    case STAGE_O:
      return {scratch.attended[0], ATTENTION};
    case STAGE_DOWN:
      return {scratch.activations[0], INNER};
    default:
      return {scratch.input[0], HIDDEN};
  }
}

// Which of a trained drafter's hidden states are those after `depth` layers, -1 for none.
__device__ __forceinline__ int feature_at(const BatchPass& pass, int depth) {
  int feature = -1;
  for (int f = 0; f < pass.features; f++)
    if (pass.feature_depths[f] == depth) feature = f;
  return feature;
}
__device__ __forceinline__ unsigned short* feature_place(const BatchPass& pass, int row, int feature) {
  const size_t position = static_cast<size_t>(pass.row[row].slot) * pass.capacity + pass.row[row].position;
  return pass.feature_states + (position * pass.features + feature) * HIDDEN;
}
// As bf16.
__device__ __forceinline__ unsigned short feature_of(float v) { return __float_as_uint(v) + 0x8000 >> 16; }

// 16 bytes to shared memory without a thread waiting for them, or zeros where nothing is there.
__device__ __forceinline__ void copy_16(unsigned to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last PENDING groups of copies are there.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four numbers of a head of a row (heads.cuh), rotated and rounded: of a query to `queries` [heads][head size], of a
// key or value to the caches. Consecutive lanes have all of a head.
__device__ __forceinline__ void place_quarter(const BatchPass& pass, const Layer& layer, int row, int head, int part,
                                              half* queries) {
  const int slot = pass.row[row].slot, position = pass.row[row].position, kv_head = (head - HEADS) % KV_HEADS;
  const size_t tables = (static_cast<size_t>(layer.rotary) * pass.capacity + position) * (ROTARY / 2);
  const bool query = head < HEADS, value = head >= HEADS + KV_HEADS;
  const int2 at = quarter_of_head(part, !value);
  const float* from = pass.scratch->products[row] + head * HEAD;
  float2 u = *reinterpret_cast<const float2*>(from + at.x), v = *reinterpret_cast<const float2*>(from + at.y);
  if (!value) {
    if (SEDAC_QUERY_KEY_NORM) normalise_head(u, v, query ? layer.query_norm : layer.key_norm, at.x, at.y, threadIdx.x);
    if (at.x < ROTARY) rotate(u, v, pass.cos + tables + at.x, pass.sin + tables + at.x);
  }
  const size_t cached = ((static_cast<size_t>(slot) * KV_HEADS + kv_head) * pass.capacity + position) * HEAD;
  half* to = query ? queries + head * HEAD : (value ? layer.values : layer.keys) + cached;
  *reinterpret_cast<unsigned*>(to + at.x) = packed(u.x, u.y);
  *reinterpret_cast<unsigned*>(to + at.y) = packed(v.x, v.y);
}
