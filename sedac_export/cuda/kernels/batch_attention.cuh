// Attention of one row to a block, as decoding several sequences has it: a warp takes a chunk of keys, the chunks that
// combine.cuh adds together are there at once, and are added as it does.
#pragma once
#include "batch_tables.cuh"
#include "warp_attention.cuh"

// A chunk's sums, of each query head of the group.
struct ChunkSums {
  float sums[GROUP][HEAD];
  float largest[GROUP], total[GROUP];
};

// Chunks that are there at once, whole groups of those that are added together, and warps that take them.
constexpr int ROOM_FOR_KEYS =
    (BATCH_STAGE_LIMIT - WARPS * sizeof(ChunkSums) - GROUP * HEAD * 2) / sizeof(AttentionKeys);
constexpr int CHUNKS_THERE = ROOM_FOR_KEYS < WARPS ? CHUNKS_ADDED : WARPS;
constexpr int CHUNK_WARPS = ROOM_FOR_KEYS < CHUNKS_THERE ? ROOM_FOR_KEYS : CHUNKS_THERE;
static_assert(CHUNK_WARPS >= 1 && WARPS % CHUNKS_ADDED == 0, "shared memory is too small for attention of batches");

struct BatchAttentionMemory {
  AttentionKeys keys[CHUNK_WARPS];
  ChunkSums chunks[CHUNKS_THERE];
  alignas(16) half queries[GROUP][HEAD];
};

struct BatchAttention {
  static constexpr int OUTPUTS = divided_up(GROUP * HEAD, THREADS);  // of a thread

  const BatchPass& pass;
  BatchAttentionMemory& memory;
  const half *keys, *values;  // of the head
  int row, kv_head, position;
  int known;                    // positions whose keys and values are in the caches
  int seen, shift, first, end;  // the first position that it sees; chunks: the logarithm of their keys, and which
  WarpAttention warp;
  // Of each of the thread's outputs, over all chunks that were added.
  float largest[OUTPUTS], total[OUTPUTS], sum[OUTPUTS];

  __device__ __forceinline__ BatchAttention(const BatchPass& pass, const Layer& layer, BatchAttentionMemory& memory,
                                            int row, int kv_head)
      : pass(pass), memory(memory), row(row), kv_head(kv_head), position(pass.row[row].position) {
    const size_t slot = (static_cast<size_t>(pass.row[row].slot) * KV_HEADS + kv_head) * pass.capacity * HEAD;
    keys = layer.keys + slot, values = layer.values + slot;
    warp.window = layer.window, warp.position = position;
    known = position + 1;
    seen = warp.window ? max(position - warp.window + 1, 0) : 0, shift = chunk_shift(position);
    first = seen >> shift, end = (position >> shift) + 1;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) largest[k] = -1e30f, total[k] = sum[k] = 0;
  }

  // The sequence's rows up to this one have no keys and values in the caches yet: see place_heads.
  __device__ __forceinline__ void note_unplaced() { known = pass.row[first_row()].position; }

  // By a block: asks for keys and values that are known, also to L2 only.
  __device__ __forceinline__ void prefetch() const {
    constexpr int LINE = 64;  // halves
#pragma unroll 1
    for (int at = seen * HEAD / LINE * LINE + threadIdx.x * LINE; at < known * HEAD; at += THREADS * LINE) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + at));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(values + at));
    }
  }
  // Of the first chunks that are there at once, all of the block's warps, since they are sent one instruction after
  // another. They have come when `run` is called.
  __device__ __forceinline__ void begin() {
    const int there = first / CHUNKS_ADDED * CHUNKS_ADDED, chunks = min(last_of(there), first + CHUNK_WARPS) - first;
#pragma unroll 1
    for (int i = 0; i < chunks; i++) {
      const int key = first_key(first + i);
      copy(memory.keys[i], key, key, min(key + KEYS, known), threadIdx.x, THREADS);
    }
  }

  // By a block: what QKV gave becomes queries, and keys and values in the caches: also those of the sequence's rows
  // before, since the blocks that have these may not have come so far. They write the same.
  __device__ __forceinline__ void place_heads(const Layer& layer) {
    constexpr int QUARTERS = HEAD / 4;
    const int first = first_row(), items = (GROUP + 2 * (row - first + 1)) * QUARTERS;
    for (int i = threadIdx.x; i < items; i += THREADS) {
      const int head = i / QUARTERS, other = head - GROUP;
      if (head < GROUP)
        place_quarter(pass, layer, row, kv_head * GROUP + head, i % QUARTERS,
                      memory.queries[0] - kv_head * GROUP * HEAD);
      else
        place_quarter(pass, layer, first + other / 2, HEADS + other % 2 * KV_HEADS + kv_head, i % QUARTERS, nullptr);
    }
  }

  // Of the queries [GROUP][HEAD], after `begin`.
  __device__ __forceinline__ void run(const half* queries) {
    wait_for_copies<0>();
    __syncthreads();
    warp.load_queries(queries, queries);  // nobody looks at the second token
    const int warp = threadIdx.x / 32;
    bool begun = true;
#pragma unroll 1
    for (int there = first / CHUNKS_ADDED * CHUNKS_ADDED; there < end; there += CHUNKS_THERE) {
      const int from = max(there, first), to = last_of(there);
#pragma unroll 1
      for (int chunk = from + warp; warp < CHUNK_WARPS && chunk < to; chunk += CHUNK_WARPS) {
        attend(first_key(chunk), min((chunk + 1) << shift, position + 1), chunk - there, begun);
        begun = false;
      }
      __syncthreads();
#pragma unroll 1
      for (int group = there; group < to; group += CHUNKS_ADDED)
        add(max(group, from) - there, min(group + CHUNKS_ADDED, to) - there);
      __syncthreads();
      begun = false;
    }
    write();
  }

 private:
  // Of the sequence's rows in the batch, which lie one after another, as their positions do.
  __device__ __forceinline__ int first_row() const {
    int first = row;
    while (first && pass.row[first - 1].slot == pass.row[row].slot) first--;
    return first;
  }
  // Of a chunk that it sees.
  __device__ __forceinline__ int first_key(int chunk) const { return max(chunk << shift, seen / KEYS * KEYS); }
  // Where those end that are there at once, from chunk `there` on.
  __device__ __forceinline__ int last_of(int there) const { return min(there + CHUNKS_THERE, end); }

  // `threads` threads ask for keys, then for values, from `begin` on up to `stop`, of those from `first_key` on.
  __device__ __forceinline__ void copy(AttentionKeys& to, int first_key, int begin, int stop, int thread,
                                       int threads) const {
    copy_rows(to.keys, keys, first_key, begin, stop, position + 1, thread, threads);
    end_copies();
    copy_rows(to.values, values, first_key, begin, stop, position + 1, thread, threads);
    end_copies();
  }

  // By a warp: keys from `first_key` on up to `end`, to the chunk number `number` of those that are there. `begun`:
  // whether the first of them that were known have come.
  __device__ __forceinline__ void attend(int first_key, int end, int number, bool begun) {
    AttentionKeys& of_warp = memory.keys[threadIdx.x / 32];
    WarpAttention::Chunk chunk;
#pragma unroll 1
    for (int key = first_key; key < end; key += KEYS) {
      copy(of_warp, key, begun ? max(key, known) : key, key + KEYS, threadIdx.x % 32, 32);
      begun = false;
      wait_for_copies<1>();
      __syncwarp();
      warp.attend(chunk, of_warp, key, [] {
        wait_for_copies<0>();
        __syncwarp();
      });
      __syncwarp();
    }
    WarpAttention::Partial partial;
    WarpAttention::end(chunk, partial);
    const int head = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (head >= GROUP) return;
    ChunkSums& to = memory.chunks[number];
#pragma unroll
    for (int q = 0; q < WarpAttention::UNITS; q++)
      *reinterpret_cast<float2*>(&to.sums[head][q * 8 + 2 * t]) = make_float2(partial.sums[q][0], partial.sums[q][1]);
    if (!t) to.largest[head] = partial.largest[0], to.total[head] = partial.total[0];
  }

  // As `combined` does.
  __device__ __forceinline__ void add(int begun, int ended) {
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      const int output = min(static_cast<int>(threadIdx.x) + k * THREADS, GROUP * HEAD - 1);
      const int head = output / HEAD, column = output % HEAD;
      float next = largest[k];
      for (int c = begun; c < ended; c++) next = fmaxf(next, memory.chunks[c].largest[head]);
      const float f = power_of_2(largest[k] - next);
      largest[k] = next, total[k] *= f, sum[k] *= f;
      for (int c = begun; c < ended; c++) {
        const float e = power_of_2(memory.chunks[c].largest[head] - next);
        total[k] = fmaf(e, memory.chunks[c].total[head], total[k]);
        sum[k] = fmaf(e, memory.chunks[c].sums[head][column], sum[k]);
      }
    }
  }

  // The input of O.
  __device__ __forceinline__ void write() const {
    half* to = pass.scratch->attended[row] + kv_head * GROUP * HEAD;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      const int output = threadIdx.x + k * THREADS;
      const unsigned word = __half_as_ushort(__float2half(sum[k] * (1.f / total[k])));
      if (output < GROUP * HEAD) to[output] = __ushort_as_half(output % 4 ? word : word & ~1u);
    }
  }
};
