// What is wanted soon goes to L2 while memory is idle: weights that the ring has no room for, and the next layer's
// vectors, keys and values. (Down's weights: 2 % of the time of Qwen2.5-0.5B's shape.)
#pragma once
#include "shared.cuh"

template <int N>
struct Prefetch {
  const Pass& pass;
  const Shared<N>& shared;
  int tid;

  __device__ __forceinline__ void run(int stage, int layer, int last_layer) const {
    const int warp = tid >> 5;
    constexpr int WEIGHTS =
        (divided_up(QKV_TILES, USUAL_BLOCKS) * HIDDEN_COLUMNS + divided_up(O_TILES, USUAL_BLOCKS) * ATTENTION_COLUMNS +
         divided_up(GATE_UP_TILES, USUAL_BLOCKS) * HIDDEN_COLUMNS +
         divided_up(DOWN_TILES, USUAL_BLOCKS) * INNER_COLUMNS) /
        WARPS;
    if (WEIGHTS > RING_SLOTS<N> && stage == STAGE_QKV && !(tid & 31)) {
      const int2 range = shared.tables.range[STAGE_DOWN][warp];
#pragma unroll 1
      for (int i = range.x; i < range.y; i++) {
        const Piece piece = shared.tables.piece[warp][i];
        const char* from = shared.layers[layer].matrices[STAGE_DOWN] + static_cast<size_t>(piece.offset) * BLOCK_BYTES;
        if (piece.count) prefetch_weights(from, piece.count * BLOCK_BYTES);
      }
    }
    if (stage == STAGE_QKV && layer + 1 < last_layer && block_index() == layer % pass.blocks) vectors(layer + 1);
    if (stage == STAGE_GATE_UP && layer + 1 < last_layer) cache(layer + 1);
  }

 private:
  // By one block: the layer's vectors, which every block reads when it can wait least.
  __device__ __forceinline__ void vectors(int layer) const {
    const Layer& of = shared.layers[layer];
    if (tid < HIDDEN / 32) {
      to_l2(of.attention_norm + tid * 32), to_l2(of.mlp_norm + tid * 32);
    }
    if (of.qkv_bias) {
#pragma unroll 1
      for (int i = tid; i < QKV / 32; i += THREADS) to_l2(of.qkv_bias + i * 32);
    }
  }
  __device__ __forceinline__ static void to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

  // A chunk of a sequence to each block. (Only where a pass has one row: SmolLM2's shape 467 us for two rows instead of
  // 454.)
  __device__ __forceinline__ void cache(int layer) const {
    int item = pass.blocks - 1 - block_index();
#pragma unroll 1
    for (int s = 0; s < (N == 1 ? 1 : pass.sequences); s++) {
      const SequenceRows& of = pass.sequence[s];
      const int newest = N == 1 ? 0 : of.first_row + of.rows - 1;
      const int shift = shared.chunk_shift[newest], chunks = (shared.position[newest] >> shift) + 1;
      if (item < KV_HEADS * chunks) return cached(shared.layers[layer], of.slot, item / chunks, item % chunks, shift);
      item -= KV_HEADS * chunks;
    }
  }
  __device__ __forceinline__ void cached(const Layer& of, int slot, int kv_head, int chunk, int shift) const {
    const int keys = 1 << shift, first = chunk * keys;
    const int lines = min(keys, pass.capacity - first) * HEAD / 64;
    const size_t at = ((static_cast<size_t>(slot) * KV_HEADS + kv_head) * pass.capacity + first) * HEAD;
#pragma unroll 1
    for (int i = tid; i < 2 * lines; i += THREADS)
      to_l2(i < lines ? of.keys + at + i * 64 : of.values + at + (i - lines) * 64);
  }
};
