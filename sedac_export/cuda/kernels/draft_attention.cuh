// Attention of a trained drafter's newest position over its cache, and where the drafter's blocks exchange results.
//
// A warp takes one query head and one chunk of keys, a key to each lane, and gives a partial sum; the input of O
// combines them.
#pragma once
#include "draft_products.cuh"

// What the blocks exchange, in floats.
struct DraftScratch {
  float* start;

  static constexpr int STATE = 64;  // after the barrier's counters
  static constexpr int LAYER_INPUT = STATE + DRAFT_ROWS * HIDDEN;
  static constexpr int QUERY = LAYER_INPUT + DRAFT_ROWS * HIDDEN;
  static constexpr int PARTIAL = QUERY + ATTENTION;
  static constexpr int SOFTMAX = PARTIAL + HEADS * DRAFT_CHUNKS * HEAD;
  static constexpr int AFTER_ATTENTION = SOFTMAX + HEADS * DRAFT_CHUNKS * 2;
  static constexpr int ACTIVATION = AFTER_ATTENTION + HIDDEN;  // halves
  static constexpr int BEST = (ACTIVATION + INNER / 2 + 3) / 4 * 4;
  static constexpr int FLOATS = BEST + 2 * MAX_BLOCKS * 4;
  static_assert(FLOATS % 4 == 0 && STATE >= 2 * DRAFT_SEQUENCES, "words of 16 bytes, after a counter of 8 each");

  // Of one of several sequences.
  __device__ __forceinline__ DraftScratch(float* scratch, int sequence) : start(scratch + sequence * FLOATS) {}
  // A counter for each number of sequences, since a sequence has other blocks then.
  __device__ __forceinline__ unsigned long long* arrived(int sequences) const {
    return reinterpret_cast<unsigned long long*>(start) + sequences - 1;
  }
  __device__ __forceinline__ float* state(int row) const { return start + STATE + row * HIDDEN; }
  __device__ __forceinline__ float* layer_input(int row) const { return start + LAYER_INPUT + row * HIDDEN; }
  __device__ __forceinline__ float* query() const { return start + QUERY; }
  __device__ __forceinline__ float* partial(int head, int chunk) const {
    return start + PARTIAL + (head * DRAFT_CHUNKS + chunk) * HEAD;
  }
  // The largest score, and the sum of exponentials relative to it.
  __device__ __forceinline__ float2* softmax(int head, int chunk) const {
    return reinterpret_cast<float2*>(start + SOFTMAX) + head * DRAFT_CHUNKS + chunk;
  }
  __device__ __forceinline__ float* after_attention() const { return start + AFTER_ATTENTION; }
  __device__ __forceinline__ half* activation() const { return reinterpret_cast<half*>(start + ACTIVATION); }
  __device__ __forceinline__ int4* best(int kind, int block) const {
    return reinterpret_cast<int4*>(start + BEST) + kind * MAX_BLOCKS + block;
  }
};

struct DraftAttention {
  const DraftPass& pass;
  const DraftScratch& scratch;
  DraftShared& shared;
  int slot, block;

  static constexpr int PAIRS = divided_up(HEAD, 64);  // of a head's elements, a lane

  // Partial sums for the query at `position`.
  __device__ __forceinline__ void run(int position) const {
    const int keys = position + 1, size = chunk_size(keys), chunks = divided_up(keys, size);
#pragma unroll 1
    for (int d = threadIdx.x; d < ATTENTION; d += DRAFT_THREADS) shared.query[d] = load_result(scratch.query() + d);
    __syncthreads();
#pragma unroll 1
    for (int i = block + pass.blocks * (threadIdx.x >> 5); i < HEADS * chunks; i += pass.blocks * DRAFT_WARPS)
      attend(i / chunks, i % chunks, size, keys);
  }

  // The sums of all chunks, as the input of O.
  __device__ __forceinline__ void combine(int position) const {
    const int keys = position + 1, chunks = divided_up(keys, chunk_size(keys));
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll 1
    for (int head = warp; head < HEADS; head += DRAFT_WARPS) {
      const float2 of = lane < chunks ? __ldcg(scratch.softmax(head, lane)) : make_float2(-INFINITE, 0);
      const float share = expf(of.x - highest_of_lanes(of.x));
      shared.shares[head][lane] = share / sum_of_lanes<32>(share * of.y);
    }
    __syncthreads();
#pragma unroll 1
    for (int d = threadIdx.x; d < ATTENTION; d += DRAFT_THREADS) {
      const int head = d / HEAD;
      float sum = 0;
#pragma unroll 8
      for (int chunk = 0; chunk < chunks; chunk++)
        sum = fmaf(shared.shares[head][chunk], load_result(scratch.partial(head, chunk) + d % HEAD), sum);
      shared.input[d] = bounded_half(sum);
    }
    __syncthreads();
  }

 private:
  // (From 64 keys on, and half as many keys and values asked for at once, eight tokens of SmolLM2's drafter took 292 us
  // instead of 267.)
  __device__ __forceinline__ static int chunk_size(int keys) {
    return max(32, divided_up(divided_up(keys, DRAFT_CHUNKS), 32) * 32);
  }
  __device__ __forceinline__ static float highest_of_lanes(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
    return v;
  }

  __device__ __forceinline__ void attend(int head, int chunk, int size, int keys) const {
    const int lane = threadIdx.x & 31, end = min(keys, (chunk + 1) * size);
    const size_t cache = (static_cast<size_t>(slot) * KV_HEADS + head / GROUP) * pass.capacity * HEAD;
    const half *key = pass.keys + cache, *value = pass.values + cache;
    float highest = -INFINITE, total = 0;
    float2 sums[PAIRS] = {};
#pragma unroll 1
    for (int first = chunk * size; first < end; first += 32) {
      const bool there = first + lane < end;
      const float score =
          there ? dot_key(shared.query + head * HEAD, key + static_cast<size_t>(first + lane) * HEAD) : -INFINITE;
      const float before = highest;
      highest = fmaxf(highest, highest_of_lanes(score));
      const float weight = expf(score - highest), kept = expf(before - highest);
      total = total * kept + sum_of_lanes<32>(weight);
#pragma unroll
      for (int k = 0; k < PAIRS; k++) sums[k].x *= kept, sums[k].y *= kept;
#pragma unroll 16
      for (int i = 0; i < 32; i++) {
        const float share = __shfl_sync(~0u, weight, i);
        if (first + i >= end) continue;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
          const int d = 2 * lane + 64 * k;
          if (d >= HEAD) continue;
          const unsigned v =
              __ldcg(reinterpret_cast<const unsigned*>(value + static_cast<size_t>(first + i) * HEAD + d));
          const float2 pair = __half22float2(as_half2(v));
          sums[k].x = fmaf(share, pair.x, sums[k].x), sums[k].y = fmaf(share, pair.y, sums[k].y);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < PAIRS; k++)
      if (2 * lane + 64 * k < HEAD)
        *reinterpret_cast<float2*>(scratch.partial(head, chunk) + 2 * lane + 64 * k) = sums[k];
    if (!lane) *scratch.softmax(head, chunk) = make_float2(highest, total);
  }

  __device__ __forceinline__ static float dot_key(const float* query, const half* key) {
    float sum = 0;
#pragma unroll 8
    for (int d = 0; d < HEAD; d += 8) {
      const uint4 v = __ldcg(reinterpret_cast<const uint4*>(key + d));
      const unsigned halves[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(as_half2(halves[i]));
        sum = fmaf(query[d + 2 * i + 1], pair.y, fmaf(query[d + 2 * i], pair.x, sum));
      }
    }
    return sum * rsqrtf(static_cast<float>(HEAD));
  }
};
