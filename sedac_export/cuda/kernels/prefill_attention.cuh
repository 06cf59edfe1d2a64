// Prefill's attention: a block takes some tokens of a key-value head over all keys, KEYS at a time, and a warp two of
// the tokens, whose query heads lie in the mma's rows as in attention.cuh.
//
// The chunks that attention.cuh spreads over blocks come one after another here, and are added as combine.cuh does, so
// every sum has the same order.
#pragma once
#include "warp_attention.cuh"

// Of a block. (A layer's attention of 256 tokens behind 2000 with 2, 4 and 8 warps: SmolLM2's shape 48, 42 and 64 us,
// Mistral-7B's 245, 164 and 170. With a block for each two tokens, whose warps shared keys and columns, SmolLM2's took
// 132 behind 3000 and 58 since.)
constexpr int ATTENTION_WARPS = 4, ATTENTION_THREADS = ATTENTION_WARPS * 32;
static_assert(2 * ATTENTION_WARPS == BATCH_GROUP_ROWS, "a warp to two of a group's tokens");

// The next keys come while others are read.
constexpr int PREFILL_ATTENTION_BYTES = 2 * sizeof(AttentionKeys);
static_assert(HEAD <= 128 && PREFILL_ATTENTION_BYTES <= SHARED_LIMIT, "a warp's registers hold the sums of two tokens");

struct PrefillAttention {
  static constexpr int UNITS = WarpAttention::UNITS;
  using Partial = WarpAttention::Partial;

  const BatchPass& pass;
  AttentionKeys* memory;      // [2]
  const half *keys, *values;  // of the head
  int kv_head;
  int first_row, last_row, start, end;  // of the group; positions of its first row, and after its last one
  int row;                              // the warp's first
  WarpAttention warp;
  // Of both rows, all chunks that were added.
  float largest[2] = {-1e30f, -1e30f}, total[2] = {0, 0}, sum[UNITS][4] = {};

  __device__ __forceinline__ PrefillAttention(const BatchPass& pass, const Layer& layer, AttentionKeys* memory)
      : pass(pass), memory(memory), kv_head(blockIdx.y), first_row(pass.group[blockIdx.x]) {
    last_row = (blockIdx.x + 1 < pass.groups ? pass.group[blockIdx.x + 1] : pass.rows) - 1;
    start = pass.row[first_row].position, end = pass.row[last_row].position + 1;
    row = first_row + threadIdx.x / 32 * 2;
    const size_t first = (static_cast<size_t>(pass.row[first_row].slot) * KV_HEADS + kv_head) * pass.capacity * HEAD;
    keys = layer.keys + first, values = layer.values + first;
    warp.window = layer.window, warp.position = start + row - first_row;
    const auto queries = [&](int row) { return pass.scratch->queries[min(row, last_row)] + kv_head * GROUP * HEAD; };
    warp.load_queries(queries(row), queries(row + 1));
  }

  __device__ __forceinline__ void run() {
    const int seen = warp.window ? max(start - warp.window + 1, 0) : 0;
    const int first = seen / KEYS, last = (end - 1) / KEYS;  // keys, KEYS at a time
    const int of_chunk = 1 << chunk_shift(start) - (KEYS == 64 ? 6 : 7);
    Partial partials[CHUNKS_ADDED];
    WarpAttention::Chunk chunk;
    int begun = 0, ended = 0;  // of `partials`
    copy(first, first);
#pragma unroll 1
    for (int at = first; at <= last; at++) {
      wait_for_copies<0>();
      __syncthreads();
      if (at < last) copy(at + 1, first);
      warp.attend(chunk, memory[(at - first) % 2], at * KEYS, [] {});
      if ((at + 1) % of_chunk && at < last) continue;
      const int number = at / of_chunk % CHUNKS_ADDED;
      if (begun == ended) begun = number;
      warp.end(chunk, partials[number]);
      ended = number + 1;
      if (ended < CHUNKS_ADDED && at < last) continue;
      add_chunks(partials, begun, ended);
      begun = ended = 0;
    }
    write();
  }

 private:
  // Asks for KEYS keys and their values.
  __device__ __forceinline__ void copy(int at, int first) {
    AttentionKeys& to = memory[(at - first) % 2];
    const int key = at * KEYS;
    copy_rows(to.keys, keys, key, key, key + KEYS, end, threadIdx.x, ATTENTION_THREADS);
    copy_rows(to.values, values, key, key, key + KEYS, end, threadIdx.x, ATTENTION_THREADS);
    end_copies();
  }

  // As `combined` does. Chunks that a row does not see add nothing to it.
  __device__ __forceinline__ void add_chunks(const Partial (&partials)[CHUNKS_ADDED], int begun, int ended) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      float next = largest[upper];
      for (int c = begun; c < ended; c++) next = fmaxf(next, partials[c].largest[upper]);
      const float f = power_of_2(largest[upper] - next);
      largest[upper] = next, total[upper] *= f;
#pragma unroll
      for (int q = 0; q < UNITS; q++) sum[q][2 * upper] *= f, sum[q][2 * upper + 1] *= f;
      for (int c = begun; c < ended; c++) {
        const float e = power_of_2(partials[c].largest[upper] - next);
        total[upper] = fmaf(e, partials[c].total[upper], total[upper]);
#pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
          float& of = sum[i / 2][2 * upper + i % 2];
          of = fmaf(e, partials[c].sums[i / 2][2 * upper + i % 2], of);
        }
      }
    }
  }

  // The input of O.
  __device__ __forceinline__ void write() const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      if (g >= GROUP || row + upper > last_row) continue;
      const float f = 1.f / total[upper];
#pragma unroll
      for (int q = 0; q < UNITS; q++) {
        const unsigned halves = packed(sum[q][2 * upper] * f, sum[q][2 * upper + 1] * f);
        half* to = pass.scratch->attended[row + upper] + (kv_head * GROUP + g) * HEAD + q * 8 + 2 * t;
        *reinterpret_cast<unsigned*>(to) = t % 2 ? halves : halves & ~1u;
      }
    }
  }
};
