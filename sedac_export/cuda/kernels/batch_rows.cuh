// What the kernels of a batch have in common, and heads.
#pragma once
#include "exits.cuh"
#include "heads.cuh"
#include "tables.cuh"

// Blocks that look for a row's token.
constexpr int CANDIDATE_BLOCKS = 16;

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
  alignas(16) float products[BATCH_ROWS][larger(QKV, HIDDEN)];    // of QKV, of O and of down
  alignas(16) half input[BATCH_ROWS][larger(HIDDEN, ATTENTION)];  // of QKV, of O, and of gate and up
  alignas(16) half queries[BATCH_ROWS][ATTENTION];
  alignas(16) half activations[BATCH_ROWS][INNER];  // the input of down
  // The factor of the last norm, and by what a product of its input is to be scaled: see residual.cuh.
  float factor[BATCH_ROWS], scale[BATCH_ROWS];
  // By logits row: the head's input, and each block's highest logit and its first of the race, see head.cuh.
  alignas(16) half head_input[BATCH_LOGITS_ROWS][HIDDEN];
  int4 candidates[2][BATCH_LOGITS_ROWS][CANDIDATE_BLOCKS];
  int exit_of_row[BATCH_ROWS];  // an index of `exit`, -1 for none; of no meaning where no rule decides
  RowExit exit[BATCH_LOGITS_ROWS];
};

// The kernels of a batch of few rows start while the one before them ends, as far as there is room, and its results may
// be read from await_previous_kernel on. (32 sequences behind 500 tokens: SmolLM2's shape 889 us instead of 1183,
// Mistral-7B's 7526 instead of 7951. 256 rows: 2392 instead of 1984, and 24.9 ms instead of 21.5: those do not.)
__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void follow_previous_kernel() {
  start_next_kernel();
  await_previous_kernel();
}

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

// A row to each block: queries, and keys and values to the caches, rotated and rounded.
extern "C" __global__ void __launch_bounds__(THREADS)
    batch_heads(const __grid_constant__ BatchPass pass, int layer, int) {
  follow_previous_kernel();
  constexpr int QUARTERS = HEAD / 4;
  const Layer& of = pass.layers[layer];
  const int row = blockIdx.x, slot = pass.row[row].slot, position = pass.row[row].position;
  const size_t tables = (static_cast<size_t>(of.rotary) * pass.capacity + position) * (ROTARY / 2);
  for (int i = threadIdx.x; i < (HEADS + 2 * KV_HEADS) * QUARTERS; i += THREADS) {
    const int head = i / QUARTERS, kv_head = (head - HEADS) % KV_HEADS;
    const bool query = head < HEADS, value = head >= HEADS + KV_HEADS;
    const int2 at = quarter_of_head(i % QUARTERS, !value);
    const float* from = pass.scratch->products[row] + head * HEAD;
    float2 u = *reinterpret_cast<const float2*>(from + at.x), v = *reinterpret_cast<const float2*>(from + at.y);
    if (!value) {
      if (SEDAC_QUERY_KEY_NORM) normalise_head(u, v, query ? of.query_norm : of.key_norm, at.x, at.y, threadIdx.x);
      if (at.x < ROTARY) rotate(u, v, pass.cos + tables + at.x, pass.sin + tables + at.x);
    }
    const size_t cached = ((static_cast<size_t>(slot) * KV_HEADS + kv_head) * pass.capacity + position) * HEAD;
    half* to = query ? pass.scratch->queries[row] + head * HEAD : (value ? of.values : of.keys) + cached;
    *reinterpret_cast<unsigned*>(to + at.x) = packed(u.x, u.y);
    *reinterpret_cast<unsigned*>(to + at.y) = packed(v.x, v.y);
  }
}
