// Caches of the layers that a token skips get the keys and values that these make of the hidden state it exits with
// (CALM, Schuster et al. 2022).
//
// None of these layers waits for another, so their tiles of keys and of values go round all blocks at once, a tile to a
// warp. Blocks exchange them as words, since the two halves that a head's rotation joins lie in different tiles.
// Nothing is left to a later pass, and another step may follow without the host, for which the head's words are the
// barrier. Sums have the order that the chain's own have.
#pragma once
#include "attention.cuh"

template <int N>
struct CacheFill {
  const Pass& pass;
  Shared<N>& shared;
  float* scratch;

  static constexpr int TILES = KEY_VALUES / 16, FIRST_TILE = ATTENTION / 16, UNITS = divided_up(TILES, WARPS);
  static constexpr int AT_ONCE = 6;  // column blocks of a tile

  // `depth`: at which the lane's sequence stopped; `odd`: see layer_parities.
  __device__ __forceinline__ void run(int depth, unsigned odd) const {
    const int first = find_rows(depth);
    if (first == LAYERS) return;
    project(first, odd);
    store();
    // it is a layer's work
    if (!block_index() && !thread_index()) pass.outcome->layers_ended[shared.step] = now();
  }

 private:
  // Keys, before they are rotated, and values, as words: a tile of a layer's to each warp.
  __device__ __forceinline__ void project(int first, unsigned odd) const {
    const int tid = thread_index(), warp = tid >> 5, lane = tid & 31;
    const int from = warp < (N == 1 ? 1 : pass.rows) ? shared.filled_from[warp] : LAYERS;
    const StreamPairs hidden{scratch + warp * SCRATCH_ROW + SCRATCH_AFTER_LAYER,
                             row_parity<N>(layer_parities(odd, from - 1), warp)};
#pragma unroll 1
    for (int unit = block_index(); unit < (LAYERS - first) * UNITS; unit += pass.blocks) {
      const int layer = first + unit / UNITS, tile = unit % UNITS * WARPS + warp;
      if (from <= layer)
        normalise(lane, shared.input[warp], shared.layers[layer].attention_norm, shared.factor_before[warp], hidden);
      sync_block();
      if (tile < TILES) multiply(lane, layer, tile);
      sync_block();
    }
  }

  // Keys, normed and rotated, and values to the caches: a quarter of a head to each thread.
  __device__ __forceinline__ void store() const {
    constexpr int QUARTERS = HEAD / 4, OF_LAYER = KEY_VALUES / 4;
    const int tid = thread_index(), first = block_index() * THREADS + tid;
#pragma unroll 1
    for (int row = 0; row < (N == 1 ? 1 : pass.rows); row++) {
      const int from = shared.filled_from[row];
#pragma unroll 1
      for (int i = first; i < (LAYERS - from) * OF_LAYER; i += pass.blocks * THREADS) {
        const int head = i % OF_LAYER / QUARTERS;
        store_quarter(tid, row, from + i / OF_LAYER, head, quarter_of_head(i % QUARTERS, head < KV_HEADS));
      }
    }
    __syncwarp();
  }

  // Returns the first layer that any row skips.
  __device__ __forceinline__ int find_rows(int depth) const {
    int first = LAYERS;
    const int tid = thread_index();
#pragma unroll 1
    for (int s = 0; s < (N == 1 ? 1 : pass.sequences); s++) {
      const SequenceRows& of = pass.sequence[s];
      const int from = of.fills ? __shfl_sync(~0u, depth, s * MAX_CRITERIA) : LAYERS;
      if (tid < of.rows) shared.filled_from[of.first_row + tid] = from;
      first = min(first, from);
    }
    sync_block();
    return first;
  }

  __device__ __forceinline__ ulonglong2* words(int row) const {
    return reinterpret_cast<ulonglong2*>(scratch + SCRATCH_FILLS + row * FILL_ROW);
  }
  __device__ __forceinline__ unsigned number() const { return pass.number + shared.step; }

  // By a warp: a tile of a layer's keys and values, of every row that skips it.
  __device__ __forceinline__ void multiply(int lane, int layer, int tile) const {
    const Layer& of = shared.layers[layer];
    const StageShape shape = stage_shape(STAGE_QKV, 0, 1);
    TileParts parts(FIRST_TILE + tile, shape, pass.blocks);
    const LanePlace blocks(of.matrices[STAGE_QKV] + (FIRST_TILE + tile) * HIDDEN_COLUMNS * BLOCK_BYTES, lane);
    const half* input = shared.input[N == 1 ? 0 : lane / 4] + lane % 4 * 8;
    const bool token = lane / 4 < N;
    float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0}, sums[4] = {0, 0, 0, 0};
    int end = parts.end(0);
#pragma unroll 1
    for (int first = 0; first < HIDDEN_COLUMNS; first += AT_ONCE) {
      LaneWeights<WEIGHT_BITS> weights[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) weights[k].load(blocks, min(first + k, HIDDEN_COLUMNS - 1) * BLOCK_BYTES);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int column = first + k;
        if (column >= HIDDEN_COLUMNS) break;
        const uint4 x = token ? *reinterpret_cast<const uint4*>(input + column * 32) : make_uint4(0, 0, 0, 0);
        weights[k].multiply(c, d, x, true);
        if (column + 1 < end && column + 1 < HIDDEN_COLUMNS) continue;
#pragma unroll
        for (int q = 0; q < 4; q++) sums[q] += c[q] + d[q], c[q] = d[q] = 0;
        if (column + 1 < HIDDEN_COLUMNS) end = parts.end(column + 1);
      }
    }
    publish(lane, layer, tile, sums);
  }

  __device__ __forceinline__ void publish(int lane, int layer, int tile, const float (&sums)[4]) const {
    const float* bias = shared.layers[layer].qkv_bias;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int row = lane % 4 * 2 + q % 2, element = tile * 16 + lane / 4 + q / 2 * 8;
      if (row >= (N == 1 ? 1 : pass.rows) || shared.filled_from[row] > layer) continue;
      const float v = fmaf(sums[q], shared.scale[row], bias ? bias[ATTENTION + element] : 0);
      store_number(words(row), layer * KEY_VALUES + element, number(), unflagged(v));
    }
    __syncwarp();
  }

  // head: of keys, then of values.
  __device__ __forceinline__ void store_quarter(int tid, int row, int layer, int head, int2 at) const {
    const Layer& of = shared.layers[layer];
    const NumberedPairs pairs{words(row) + (layer * KEY_VALUES + head * HEAD) / 2, number()};
    ulonglong2 low, high;
    while (low = pairs.load(at.x), high = pairs.load(at.y), !pairs.here(low) || !pairs.here(high)) continue;
    float2 u = pairs.value(low), v = pairs.value(high);
    const bool key = head < KV_HEADS;
    if (key) {
      if (SEDAC_QUERY_KEY_NORM) normalise_head(u, v, of.key_norm, at.x, at.y, tid);
      const auto& tables = shared.rotary[of.rotary][row];
      if (at.x < ROTARY) rotate(u, v, tables[0] + at.x, tables[1] + at.x);
    }
    const int slot = pass.sequence[N == 1 ? 0 : pass.row[row].sequence].slot;
    half* cache =
        (key ? of.keys : of.values) +
        ((static_cast<size_t>(slot) * KV_HEADS + head % KV_HEADS) * pass.capacity + shared.position[row]) * HEAD;
    *reinterpret_cast<unsigned*>(cache + at.x) = packed(u.x, u.y);
    *reinterpret_cast<unsigned*>(cache + at.y) = packed(v.x, v.y);
  }
};

// After exits: the caches of the layers that rows skip, and the head's input. `depth`: at which the lane's sequence
// stopped. Apart from the kernel's own code, whose registers are scarce.
template <int N>
__device__ __noinline__ void finish_exits(const Pass& pass, Shared<N>& shared, float* scratch, int depth,
                                          unsigned odd) {
  CacheFill<N>{pass, shared, scratch}.run(depth, odd);
  finish_through_lenses<N>(pass, shared, scratch, depth, odd);
}
