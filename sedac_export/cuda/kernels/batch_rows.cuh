// A batch between its products: what rows start from, heads, and the residual stream.
#pragma once
#include "heads.cuh"
#include "tables.cuh"

// Blocks that look for a row's token.
constexpr int CANDIDATE_BLOCKS = 16;

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

// A row to each warp: the embedding of its token, and its norm.
extern "C" __global__ void __launch_bounds__(THREADS) batch_start(const __grid_constant__ BatchPass pass, int, int) {
  follow_previous_kernel();
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!row && !lane) pass.outcome->started = now();
  if (row >= pass.rows) return;
  BatchScratch& scratch = *pass.scratch;
  const auto pair = [&](int d) {
    const float2 v = pair_of_row(pass.embed, HIDDEN_COLUMNS, pass.row[row].token, d);
    return make_float2(v.x * SEDAC_EMBEDDING_SCALE, v.y * SEDAC_EMBEDDING_SCALE);
  };
  for (int d = 2 * lane; d < HIDDEN; d += 64) *reinterpret_cast<float2*>(&scratch.residual[row][d]) = pair(d);
  const float factor = normalise(lane, scratch.input[row], pass.layers[0].attention_norm, 0, ReadyPairs{pair});
  if (!lane) scratch.factor[row] = factor, scratch.scale[row] = __fdividef(factor * HEADROOM, factor);
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

// By a warp: the factor of the norm of a row whose tiles of 16 numbers have these sums of squares.
__device__ __forceinline__ float norm_factor_of_tiles(const float* squares) {
  float sum = 0;
  for (int tile = threadIdx.x % 32; tile < O_TILES; tile += 32) sum += squares[tile];
  return norm_factor(sum_of_lanes<32>(sum));
}

// A row to each block, after O or after down: the product added to the residual, and the next norm. The same numbers
// as Stages::add and Residual make of them, whose words have a bit less.
__device__ __forceinline__ void add_product(const BatchPass& pass, int layer, bool mlp) {
  __shared__ float squares[O_TILES], factor;
  const Layer& of = pass.layers[layer];
  const float* output_norm = mlp ? of.mlp_post_norm : of.attention_post_norm;
  const float* next = mlp ? pass.layers[min(layer + 1, LAYERS - 1)].attention_norm : of.mlp_norm;
  const int row = blockIdx.x;
  BatchScratch& scratch = *pass.scratch;
  float *residual = scratch.residual[row], *product = scratch.products[row];
  const auto each = [&](auto f) {
    for (int i = threadIdx.x; i < HIDDEN; i += THREADS) f(i);  // HIDDEN is of whole warps
  };
  if (SEDAC_POST_NORMS) {
    each([&](int i) {
      const float v = product[i], sum = sum_of_lanes<16>(v * v);
      if (i % 16 == 0) squares[i / 16] = unflagged(sum);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      const float of_row = norm_factor_of_tiles(squares);
      if (!threadIdx.x) factor = of_row;
    }
    __syncthreads();
  }
  const float before = scratch.factor[row], scale = before * (1.f / HEADROOM);
  each([&](int i) {
    const float v = SEDAC_POST_NORMS ? product[i] * factor * output_norm[i] : product[i];
    const float h = unflagged(v + residual[i]), sum = sum_of_lanes<16>(h * h);
    const unsigned long long four = packed_lanes(h * next[i] * scale, i & 3);
    residual[i] = h;
    if (i % 16 == 0) squares[i / 16] = unflagged(sum);
    if (i % 4 == 0) *reinterpret_cast<unsigned long long*>(&scratch.input[row][i]) = four;
  });
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const float of_row = norm_factor_of_tiles(squares);
  if (threadIdx.x) return;
  scratch.factor[row] = of_row, scratch.scale[row] = __fdividef(of_row * HEADROOM, before);
  if (mlp && layer == LAYERS - 1 && row == pass.rows - 1) pass.outcome->layers_ended = now();
}

// What a trained drafter takes of a row after `depth` layers.
__device__ __forceinline__ void take_features(const BatchPass& pass, int depth) {
  const int row = blockIdx.x;
  for (int f = 0; f < pass.features; f++) {
    if (pass.feature_depths[f] != depth) continue;
    const size_t position = static_cast<size_t>(pass.row[row].slot) * pass.capacity + pass.row[row].position;
    unsigned short* to = pass.feature_states + (position * pass.features + f) * HIDDEN;
    for (int d = threadIdx.x; d < HIDDEN; d += THREADS)
      to[d] = __float_as_uint(pass.scratch->residual[row][d]) + 0x8000 >> 16;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    batch_add(const __grid_constant__ BatchPass pass, int layer, int stage) {
  follow_previous_kernel();
  add_product(pass, layer, stage == STAGE_DOWN);
  if (stage == STAGE_DOWN) take_features(pass, layer + 1);  // each thread's own numbers
}

// A row to each warp: the head's input of a row whose logits are wanted.
extern "C" __global__ void __launch_bounds__(THREADS) batch_finish(const __grid_constant__ BatchPass pass, int, int) {
  follow_previous_kernel();
  const int index = blockIdx.x * WARPS + threadIdx.x / 32;
  if (index >= pass.logits_rows) return;
  const float* residual = pass.scratch->residual[pass.logits_row[index]];
  const auto pair = [&](int d) { return *reinterpret_cast<const float2*>(residual + d); };
  normalise(threadIdx.x % 32, pass.scratch->head_input[index], pass.final_norm, 0, ReadyPairs{pair});
}
