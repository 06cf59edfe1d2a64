// Attention of one row to a block, as decoding several sequences has it: a warp takes a chunk of keys, the chunks that
// combine.cuh adds together are there at once, and are added as it does.
#pragma once
#include "warp_attention.cuh"

// A chunk's sums, of each query head of the group.
struct ChunkSums {
  float sums[GROUP][HEAD];
  float largest[GROUP], total[GROUP];
};

constexpr int ROOM_FOR_KEYS = (SHARED_LIMIT - CHUNKS_ADDED * sizeof(ChunkSums)) / sizeof(AttentionKeys);
constexpr int CHUNK_WARPS = ROOM_FOR_KEYS < CHUNKS_ADDED ? ROOM_FOR_KEYS : CHUNKS_ADDED;
constexpr int BATCH_ATTENTION_THREADS = CHUNK_WARPS * 32;
static_assert(CHUNK_WARPS >= 1, "shared memory is too small for attention of batches");

struct BatchAttentionMemory {
  AttentionKeys keys[CHUNK_WARPS];
  ChunkSums chunks[CHUNKS_ADDED];
};
constexpr int BATCH_ATTENTION_BYTES = sizeof(BatchAttentionMemory);

struct BatchAttention {
  static constexpr int OUTPUTS = divided_up(GROUP * HEAD, BATCH_ATTENTION_THREADS);  // of a thread

  const BatchPass& pass;
  BatchAttentionMemory& memory;
  const half *keys, *values;  // of the head
  int row, kv_head, position;
  WarpAttention warp;
  // Of each of the thread's outputs, over all chunks that were added.
  float largest[OUTPUTS], total[OUTPUTS], sum[OUTPUTS];

  __device__ __forceinline__ BatchAttention(const BatchPass& pass, const Layer& layer, BatchAttentionMemory& memory)
      : pass(pass), memory(memory), row(blockIdx.x), kv_head(blockIdx.y), position(pass.row[blockIdx.x].position) {
    const size_t first = (static_cast<size_t>(pass.row[row].slot) * KV_HEADS + kv_head) * pass.capacity * HEAD;
    keys = layer.keys + first, values = layer.values + first;
    warp.window = layer.window, warp.position = position;
    const half* queries = pass.scratch->queries[row] + kv_head * GROUP * HEAD;
    warp.load_queries(queries, queries);  // nobody looks at the second token
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) largest[k] = -1e30f, total[k] = sum[k] = 0;
  }

  __device__ __forceinline__ void run() {
    const int seen = warp.window ? max(position - warp.window + 1, 0) : 0, shift = chunk_shift(pass.capacity);
    const int first = seen >> shift, end = (position >> shift) + 1, first_group = first / CHUNKS_ADDED * CHUNKS_ADDED;
#pragma unroll 1
    for (int group = first_group; group < end; group += CHUNKS_ADDED) {
      const int from = max(group, first), to = min(group + CHUNKS_ADDED, end);
      if (group > first_group) __syncthreads();
#pragma unroll 1
      for (int chunk = from + threadIdx.x / 32; chunk < to; chunk += CHUNK_WARPS)
        attend(max(chunk << shift, seen / KEYS * KEYS), min((chunk + 1) << shift, position + 1), chunk - group);
      __syncthreads();
      add(from - group, to - group);
    }
    write();
  }

 private:
  // By a warp: keys from `first_key` on up to `end`, to the chunk number `number` of the group.
  __device__ __forceinline__ void attend(int first_key, int end, int number) {
    AttentionKeys& of_warp = memory.keys[threadIdx.x / 32];
    WarpAttention::Chunk chunk;
#pragma unroll 1
    for (int key = first_key; key < end; key += KEYS) {
      copy_keys(of_warp, keys, values, key, position + 1, threadIdx.x % 32, 32);
      wait_for_copies<0>();
      __syncwarp();
      warp.attend(chunk, of_warp, key);
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
      const int output = min(static_cast<int>(threadIdx.x) + k * BATCH_ATTENTION_THREADS, GROUP * HEAD - 1);
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
    half* to = pass.scratch->input[row] + kv_head * GROUP * HEAD;
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
      const int output = threadIdx.x + k * BATCH_ATTENTION_THREADS;
      const unsigned word = __half_as_ushort(__float2half(sum[k] * (1.f / total[k])));
      if (output < GROUP * HEAD) to[output] = __ushort_as_half(output % 4 ? word : word & ~1u);
    }
  }
};

extern "C" __global__ void __launch_bounds__(BATCH_ATTENTION_THREADS)
    batch_attention(const __grid_constant__ BatchPass pass, int layer, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  follow_previous_kernel();
  BatchAttention(pass, pass.layers[layer], *reinterpret_cast<BatchAttentionMemory*>(memory)).run();
}
