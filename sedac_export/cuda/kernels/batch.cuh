// Batches: more rows than a pass takes, of any sequences, through all layers, also after an exit. Each number has the
// bits that a pass gives it, so nobody can tell which of the two filled a cache or gave logits; only margins, and
// totals of races, are sums in another order.
//
// Up to SMALL_BATCH_ROWS rows are one cooperative kernel, whose blocks wait for each other after each stage. Of more, a
// stage has enough work for more blocks than there are at once, and is a kernel: batch_start; for each layer a product
// of QKV, batch_heads, attention, a product of O, batch_add, a product of gate_up and of down, and batch_add; then
// batch_head. Their products are prefill_product's, and consecutive tokens, whose blocks share keys, have attention by
// prefill_attention.
#pragma once
#include "batch_attention.cuh"
#include "batch_head.cuh"
#include "grid_barrier.cuh"
#include "prefill_attention.cuh"
#include "prefill_products.cuh"

// A block's shared memory.
struct BatchMemories {
  BatchShared kept;
  union {
    BatchMemory product;
    BatchAttentionMemory attention;
  };
};

// Keys go to L2 a half layer before attention where what is read in between leaves room for them. (9 sequences behind
// 500 positions, SmolLM2's shape: 774 and 787 us instead of 805, by builds with one piece of code for all products.
// Mistral-7B's gate, up and down are 352 MB a layer: 32 sequences 7688 us instead of 6863 to 6942, by several builds.)
constexpr long long MLP_BYTES = (1ll * GATE_UP_TILES * HIDDEN_COLUMNS + 1ll * DOWN_TILES * INNER_COLUMNS) * BLOCK_BYTES;
constexpr bool KEYS_COME_EARLY = MLP_BYTES < 16 << 20;

// A block's part of a batch.
struct Batch {
  const BatchPass& pass;
  BatchMemories& memory;
  const int block, blocks, warp;
  GridBarrier barrier;

  __device__ __forceinline__ Batch(const BatchPass& pass, void* memory)
      : pass(pass),
        memory(*static_cast<BatchMemories*>(memory)),
        block(blockIdx.y),
        blocks(gridDim.y),
        warp(threadIdx.x / 32),
        barrier(&pass.scratch->arrived, gridDim.y) {}

  __device__ __forceinline__ void run_layers() {
    auto& [layers, tables, factors] = memory.kept;
    if (!block && !threadIdx.x) pass.outcome->started = now();
    copy_layers(layers);
    for (int group = 0; group < TOKEN_GROUPS; group++) tables[group].make(chain_block(group, block, blocks), blocks);
    __syncthreads();
    if (KEYS_COME_EARLY && has_attention()) attention(layers[0], item()).prefetch();
    each_by_warp(pass.rows, [&](int row) { start_row(pass, row); });
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++)
      run_layer({layers[layer], layers[min(layer + 1, LAYERS - 1)], layer + 1}, tables, factors);
    if (!block && !threadIdx.x) pass.outcome->layers_ended = now();  // here, others are about as far
  }

  __device__ __forceinline__ void run_head() {
    if (!pass.logits_rows) return;
    wait();
    each_by_warp(pass.logits_rows, [&](int index) { finish_row(pass, index); });
    multiply_head(pass, memory.product, block, [&] { wait(); });
    wait();
    each(pass.logits_rows * CANDIDATE_BLOCKS,
         [&](int i) { find_candidates(pass, i / CANDIDATE_BLOCKS, i % CANDIDATE_BLOCKS); });
    wait();
    each_by_warp(pass.logits_rows, [&](int row) { choose_token(pass, row); });
    if (!block && !threadIdx.x) pass.outcome->ended = now();
  }

 private:
  __device__ __forceinline__ void wait() { barrier.wait(blocks); }

  // f(i) for the block's share of `count` things, and for the warp's.
  template <class F>
  __device__ __forceinline__ void each(int count, F f) const {
#pragma unroll 1
    for (int i = block; i < count; i += blocks) {
      f(i);
      __syncthreads();
    }
  }
  template <class F>
  __device__ __forceinline__ void each_by_warp(int count, F f) const {
#pragma unroll 1
    for (int i = block + warp * blocks; i < count; i += blocks * WARPS) f(i);
  }

  __device__ __forceinline__ void copy_layers(Layer* to) const {
    static_assert(sizeof(Layer) % 8 == 0, "of words of eight bytes");
    const auto* from = reinterpret_cast<const unsigned long long*>(pass.layers);
    for (int i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += THREADS)
      reinterpret_cast<unsigned long long*>(to)[i] = from[i];
  }

  __device__ __forceinline__ void run_layer(const LayerPair& layers, const BatchTables (&tables)[TOKEN_GROUPS],
                                            RowFactors& factors) {
    const Layer& layer = layers.now;
    // a norm before adding needs all of a row, and so does a rule
    const bool adds_sums = !SEDAC_POST_NORMS && !pass.deciding;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      int mlp = half;
      asm volatile("" : "+r"(mlp));  // opaque, or the compiler makes a copy of everything for each half
      const int first = mlp ? STAGE_GATE_UP : STAGE_QKV, second = mlp ? STAGE_DOWN : STAGE_O;
      const bool prefetches = KEYS_COME_EARLY ? mlp && layers.depth < LAYERS : !mlp;
      if (prefetches && has_attention()) attention(KEYS_COME_EARLY ? layers.next : layer, item()).prefetch();
      const auto find_factors = [&] {
        if (adds_sums && (mlp || layers.depth > 1))
          factors.find(pass, mlp);
        else
          factors.load(pass, mlp);
      };
      multiply(layer, first, tables, find_factors, WrittenOutputs(pass, factors, layer, first));
      if (!mlp) attend(layer);
      if (adds_sums) {
        multiply(layer, second, tables, [] {}, AddedOutputs(pass, factors, layers, mlp));
      } else {
        multiply(layer, second, tables, [] {}, WrittenOutputs(pass, factors, layer, second));
        wait();
        each(pass.rows, [&](int row) { add_to_row(pass, layers, row, mlp); });
      }
    }
  }

  // After what the stage before wrote has come; weights are asked for before.
  template <class Meanwhile, class Outputs>
  __device__ __forceinline__ void multiply(const Layer& layer, int stage, const BatchTables (&tables)[TOKEN_GROUPS],
                                           Meanwhile meanwhile, const Outputs& outputs) {
    multiply_stage(pass, layer, stage, tables, memory.product, [&] { wait(); }, meanwhile, outputs);
  }

  // Attention of a row and a key-value head at a time: the block's first, from the last block on, since the first ones
  // have QKV. (From the first block on: 9 sequences of SmolLM2's shape behind 500 positions 797 and 811 us instead of
  // 733 and 736; 32 of them as long.)
  __device__ __forceinline__ int item() const { return blocks - 1 - block; }
  __device__ __forceinline__ bool has_attention() const { return item() < pass.rows * KV_HEADS; }
  __device__ __forceinline__ BatchAttention attention(const Layer& layer, int item) const {
    BatchAttention of_item(pass, layer, memory.attention, item / KV_HEADS, item % KV_HEADS);
    of_item.note_unplaced();
    return of_item;
  }
  __device__ __forceinline__ void attend(const Layer& layer) {
    __syncthreads();  // nobody reads any more what lies there
    // before the barrier: 9 sequences 733 and 736 us instead of 781; 32 of them as long
    if (has_attention()) attention(layer, item()).begin();
    wait();
#pragma unroll 1
    for (int i = item(); i < pass.rows * KV_HEADS; i += blocks) {
      BatchAttention of_item = attention(layer, i);
      if (i != item()) of_item.begin();
      of_item.place_heads(layer);
      of_item.run(memory.attention.queries[0]);
    }
  }
};

// The whole of it.
extern "C" __global__ void __launch_bounds__(THREADS, 1) batch_whole(const __grid_constant__ BatchPass pass, int, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  Batch batch(pass, memory);
  batch.run_layers();
  batch.run_head();
}

// The stages of more rows, of layer number `layer`, by kernels; the head is cooperative, too.
extern "C" __global__ void __launch_bounds__(THREADS) batch_start(const __grid_constant__ BatchPass pass, int, int) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (!blockIdx.x && !threadIdx.x) pass.outcome->started = now();
  if (row < pass.rows) start_row(pass, row);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    batch_heads(const __grid_constant__ BatchPass pass, int layer, int) {
  constexpr int QUARTERS = HEAD / 4;
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < (HEADS + 2 * KV_HEADS) * QUARTERS; i += THREADS)
    place_quarter(pass, pass.layers[layer], row, i / QUARTERS, i % QUARTERS, pass.scratch->queries[row]);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    batch_attention(const __grid_constant__ BatchPass pass, int layer, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& of_block = *reinterpret_cast<BatchAttentionMemory*>(memory);
  const half* queries = pass.scratch->queries[blockIdx.x] + blockIdx.y * GROUP * HEAD;
  BatchAttention attention(pass, pass.layers[layer], of_block, blockIdx.x, blockIdx.y);
  attention.begin();
  attention.run(queries);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    prefill_attention(const __grid_constant__ BatchPass pass, int layer, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  PrefillAttention(pass, pass.layers[layer], reinterpret_cast<AttentionKeys*>(memory)).run();
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER)
    prefill_product(const __grid_constant__ BatchPass pass, int layer, int stage) {
  extern __shared__ __align__(128) unsigned char memory[];
  Product(pass, pass.layers[layer], stage, memory).run();
}
extern "C" __global__ void __launch_bounds__(THREADS)
    batch_add(const __grid_constant__ BatchPass pass, int layer, int stage) {
  const bool mlp = stage == STAGE_DOWN;
  const LayerPair layers{pass.layers[layer], pass.layers[min(layer + 1, LAYERS - 1)], layer + 1};
  add_to_row(pass, layers, blockIdx.x, mlp);
  if (layers.depth == LAYERS && mlp && !blockIdx.x && !threadIdx.x) pass.outcome->layers_ended = now();
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) batch_head(const __grid_constant__ BatchPass pass, int, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  Batch(pass, memory).run_head();
}
