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
  // What a lane asks for at once: words of its key, values of which it has pairs, and partial sums.
  static constexpr int KEY_WORDS = 8, VALUES = PAIRS == 1 ? 32 : PAIRS == 2 ? 16 : 8, PARTIALS = 16;

  // Partial sums for the query at `position`. The first keys and values are on their way before the query is there.
  __device__ __forceinline__ void run(int position) const {
    const int keys = position + 1, size = chunk_size(keys), chunks = divided_up(keys, size);
    int i = block + pass.blocks * (threadIdx.x >> 5), first = i % chunks * size;
    bool has_query = false;
    Partial partial;
#pragma unroll 1
    do {
      const bool works = i < HEADS * chunks;
      const int head = i / chunks, end = works ? min(keys, (i % chunks + 1) * size) : 0;
      Asked asked;
      ask(asked, head, first, end);
      if (!has_query) load_query();
      has_query = true;
      if (!works) break;
      attend(asked, partial, head, first, end);
      first += 32;
      if (first < end) continue;
      write(partial, head, i % chunks);
      partial = {};
      i += pass.blocks * DRAFT_WARPS, first = i % chunks * size;
    } while (true);
  }

  // The sums of all chunks, as the input of O; a thread has two elements.
  __device__ __forceinline__ void combine(int position) const {
    const int keys = position + 1, chunks = divided_up(keys, chunk_size(keys));
    bool has_shares = false;
#pragma unroll 1
    for (int pair = threadIdx.x; pair < ATTENTION / 2 || !has_shares; pair += DRAFT_THREADS) {
      const int head = 2 * pair / HEAD;
      float2 sum = {0, 0};
#pragma unroll 1
      for (int first = 0; first < chunks; first += PARTIALS) {
        float2 partials[PARTIALS];
        const float* from = scratch.partial(head, first) + 2 * pair % HEAD;
#pragma unroll
        for (int k = 0; k < PARTIALS; k++) {
          const bool there = pair < ATTENTION / 2 && first + k < chunks;
          partials[k] = there ? __ldcg(reinterpret_cast<const float2*>(from + k * HEAD)) : make_float2(0, 0);
        }
        if (!has_shares) find_shares(chunks);
        has_shares = true;
        if (pair < ATTENTION / 2)
#pragma unroll
          for (int k = 0; k < PARTIALS; k++) add(sum, shared.shares[head][first + k], partials[k]);
      }
      if (pair < ATTENTION / 2)
        reinterpret_cast<half2*>(shared.input)[pair] = __halves2half2(bounded_half(sum.x), bounded_half(sum.y));
    }
    __syncthreads();
  }

 private:
  // Of 32 keys: a lane's key, and its elements of all values.
  struct Asked {
    uint4 key[KEY_WORDS];
    unsigned values[VALUES][PAIRS];
  };
  // Of a chunk so far: its largest score, and sums relative to it.
  struct Partial {
    float highest = -INFINITE, total = 0;
    float2 sums[PAIRS] = {};
  };

  // (From 64 keys on, and half as many keys and values asked for at once, eight tokens of SmolLM2's drafter took 292 us
  // instead of 267.)
  __device__ __forceinline__ static int chunk_size(int keys) {
    return max(32, divided_up(divided_up(keys, DRAFT_CHUNKS), 32) * 32);
  }
  __device__ __forceinline__ static void add(float2& sum, float share, float2 pair) {
    sum.x = fmaf(share, pair.x, sum.x), sum.y = fmaf(share, pair.y, sum.y);
  }

  // By the block.
  __device__ __forceinline__ void load_query() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < ATTENTION / 4; i += DRAFT_THREADS)
      reinterpret_cast<float4*>(shared.query)[i] = __ldcg(reinterpret_cast<const float4*>(scratch.query()) + i);
    __syncthreads();
  }
  // By the block: what each chunk's sums count; 0 where there is none.
  __device__ __forceinline__ void find_shares(int chunks) const {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int head = threadIdx.x >> 5; head < HEADS; head += DRAFT_WARPS) {
      const float2 of = lane < chunks ? __ldcg(scratch.softmax(head, lane)) : make_float2(-INFINITE, 0);
      const float share = expf(of.x - largest_of_lanes(of.x));
      shared.shares[head][lane] = share / sum_of_lanes<32>(share * of.y);
    }
    __syncthreads();
  }

  // Of 32 keys from `first` on; zeros for those from `end` on.
  __device__ __forceinline__ void ask(Asked& asked, int head, int first, int end) const {
    ask_key(asked, head, first, end, 0);
    ask_values(asked, head, first, end, 0);
  }
  // The words from `word` on of a lane's key.
  __device__ __forceinline__ void ask_key(Asked& asked, int head, int first, int end, int word) const {
    const int key = first + static_cast<int>(threadIdx.x & 31);
    const uint4* from = reinterpret_cast<const uint4*>(pass.keys + cached(head, key)) + word;
#pragma unroll
    for (int k = 0; k < KEY_WORDS; k++)
      asked.key[k] = key < end && word + k < HEAD / 8 ? __ldcg(from + k) : make_uint4(0, 0, 0, 0);
  }
  // Those from number `value` on of the 32.
  __device__ __forceinline__ void ask_values(Asked& asked, int head, int first, int end, int value) const {
    const int lane = threadIdx.x & 31;
    const half* from = pass.values + cached(head, first + value) + 2 * lane;
#pragma unroll
    for (int i = 0; i < VALUES; i++)
#pragma unroll
      for (int k = 0; k < PAIRS; k++) {
        const bool there = first + value + i < end && 2 * lane + 64 * k < HEAD;
        asked.values[i][k] = there ? __ldcg(reinterpret_cast<const unsigned*>(from + i * HEAD + 64 * k)) : 0;
      }
  }
  // Where a query head's key, or value, lies.
  __device__ __forceinline__ size_t cached(int head, int key) const {
    return ((static_cast<size_t>(slot) * KV_HEADS + head / GROUP) * pass.capacity + key) * HEAD;
  }

  // 32 keys that were asked for.
  __device__ __forceinline__ void attend(Asked& asked, Partial& partial, int head, int first, int end) const {
    float score = 0;
#pragma unroll
    for (int word = 0; word < HEAD / 8; word += KEY_WORDS) {
      if (word) ask_key(asked, head, first, end, word);
      score = dot_key(shared.query + head * HEAD, asked, word, score);
    }
    const bool there = first + static_cast<int>(threadIdx.x & 31) < end;
    score = there ? score * rsqrtf(static_cast<float>(HEAD)) : -INFINITE;
    const float before = partial.highest;
    partial.highest = fmaxf(before, largest_of_lanes(score));
    const float weight = expf(score - partial.highest), kept = expf(before - partial.highest);
    partial.total = partial.total * kept + sum_of_lanes<32>(weight);
#pragma unroll
    for (int k = 0; k < PAIRS; k++) partial.sums[k].x *= kept, partial.sums[k].y *= kept;
#pragma unroll
    for (int value = 0; value < 32; value += VALUES) {
      if (value) ask_values(asked, head, first, end, value);
#pragma unroll
      for (int i = 0; i < VALUES; i++) {
        const float share = __shfl_sync(~0u, weight, value + i);
#pragma unroll
        for (int k = 0; k < PAIRS; k++) add(partial.sums[k], share, __half22float2(as_half2(asked.values[i][k])));
      }
    }
  }
  __device__ __forceinline__ void write(const Partial& partial, int head, int chunk) const {
    const int lane = threadIdx.x & 31;
    float* to = scratch.partial(head, chunk) + 2 * lane;
#pragma unroll
    for (int k = 0; k < PAIRS; k++)
      if (2 * lane + 64 * k < HEAD) *reinterpret_cast<float2*>(to + 64 * k) = partial.sums[k];
    if (!lane) *scratch.softmax(head, chunk) = make_float2(partial.highest, partial.total);
  }

  __device__ __forceinline__ static float dot_key(const float* query, const Asked& asked, int word, float sum) {
#pragma unroll
    for (int d = 0; d < KEY_WORDS; d++) {
      if (word + d >= HEAD / 8) break;
      const unsigned halves[4] = {asked.key[d].x, asked.key[d].y, asked.key[d].z, asked.key[d].w};
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float4 of = *reinterpret_cast<const float4*>(query + 8 * (word + d) + 2 * i);
        const float2 low = __half22float2(as_half2(halves[i])), high = __half22float2(as_half2(halves[i + 1]));
        sum = fmaf(of.w, high.y, fmaf(of.z, high.x, fmaf(of.y, low.y, fmaf(of.x, low.x, sum))));
      }
    }
    return sum;
  }
};
