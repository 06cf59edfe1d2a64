// The attention's output: its partial sums, weighed by their largest scores and added.
#pragma once
#include "attention.cuh"

// Chunks that are asked for at once, and those of them that are added at once.
constexpr int CHUNKS_AT_ONCE = 8, CHUNKS_ADDED = 4;

// Four numbers of a row's head: the sum over its `chunks` chunks, four at a time, rescaled to the largest score so far.
// (Eight at a time: Qwen2.5-0.5B's shape 516 us a token
// instead of 510, for eight rows 695 instead of 686.)
__device__ __forceinline__ uint2 combined(const float* partial, const float* softmax, int chunks, unsigned parity) {
  float largest = -1e30f, total = 0;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (; chunks > 0; chunks -= CHUNKS_AT_ONCE) {
    float4 v[CHUNKS_AT_ONCE];
    float2 w[CHUNKS_AT_ONCE];
    unsigned stale_bits;
    do {
      stale_bits = 0;
#pragma unroll
      for (int c = 0; c < CHUNKS_AT_ONCE; c++)
        if (c < chunks) w[c] = load2(softmax + c * SECTOR), v[c] = load4(partial + c * HEAD);
#pragma unroll
      for (int c = 0; c < CHUNKS_AT_ONCE; c++)
        if (c < chunks) stale_bits |= stale(w[c], parity) | stale(v[c], parity);
    } while (stale_bits & 1);
#pragma unroll
    for (int first = 0; first < CHUNKS_AT_ONCE; first += CHUNKS_ADDED) {
      if (first >= chunks) break;
      float next = largest;
#pragma unroll
      for (int c = first; c < first + CHUNKS_ADDED; c++)
        if (c < chunks) next = fmaxf(next, unflagged(w[c].x));
      const float f = power_of_2(largest - next);
      total *= f, sum.x *= f, sum.y *= f, sum.z *= f, sum.w *= f;
      largest = next;
#pragma unroll
      for (int c = first; c < first + CHUNKS_ADDED; c++)
        if (c < chunks) {
          const float e = power_of_2(unflagged(w[c].x) - largest);
          total = fmaf(e, unflagged(w[c].y), total);
          sum.x = fmaf(e, unflagged(v[c].x), sum.x), sum.y = fmaf(e, unflagged(v[c].y), sum.y);
          sum.z = fmaf(e, unflagged(v[c].z), sum.z), sum.w = fmaf(e, unflagged(v[c].w), sum.w);
        }
    }
    softmax += CHUNKS_AT_ONCE * SECTOR, partial += CHUNKS_AT_ONCE * HEAD;
  }
  const float f = 1.f / total;
  return make_uint2(packed(sum.x * f, sum.y * f) & ~1u, packed(sum.z * f, sum.w * f));
}

// The input of O. Where it is little, every block that has a tile of O computes all of it; where a thread would have
// more than one item to ask for, one trip to L2 after another, the blocks share the work and exchange the result, which
// costs a trip. (One row of Mistral-7B's shape 4461 us alone and 4262 shared, of Qwen2.5-1.5B's 1346 and 1245; two rows
// of SmolLM2's 525 and 541.) Either way the bits are the same: the lowest of four halves is a flag's.
template <int N>
struct Combine {
  static constexpr int ITEMS = ATTENTION / 4;  // of a row
  static constexpr bool SHARED_WORK = N > 2 || (N * ITEMS) * 2 >= THREADS * 3;

  const Pass& pass;
  Shared<N>& shared;
  float* scratch;
  unsigned active;
  unsigned parities;
  int tid;

  __device__ __forceinline__ void run(bool has_tile) {
    if (SHARED_WORK) publish();
    if (!has_tile) return;
    if (SHARED_WORK) {
      receive();
    } else {
#pragma unroll 1
      for (int i = tid; i < (N == 1 ? 1 : pass.rows) * ITEMS; i += THREADS) {
        const int row = N == 1 ? 0 : i / ITEMS, item = N == 1 ? i : i % ITEMS;
        if (has<N>(active, row)) *reinterpret_cast<uint2*>(&shared.input[row][item * 4]) = compute(row, item);
      }
    }
    sync_block();
  }

 private:
  __device__ __forceinline__ uint2 compute(int row, int item) const {
    const int head = item * 4 / HEAD;
    const float* from = scratch + row * SCRATCH_ROW;
    return combined(from + SCRATCH_PARTIAL + head * MAX_CHUNKS * HEAD + item * 4 % HEAD,
                    from + SCRATCH_SOFTMAX + head * MAX_CHUNKS * SECTOR,
                    (shared.position[row] >> shared.chunk_shift[row]) + 1, row_parity<N>(parities, row));
  }
  __device__ __forceinline__ half* output(int row, int item) const {
    return reinterpret_cast<half*>(scratch + row * SCRATCH_ROW + SCRATCH_ATTENTION) + item * 4;
  }
  // Shares go to the blocks from the first on: those with attention's chunks are the last ones.
  __device__ __forceinline__ void publish() const {
    const int all = pass.rows * ITEMS, share = divided_up(all, pass.blocks * 8) * 8;
    const int i = block_index() * share + tid;
    if (tid < share && i < all && has<N>(active, i / ITEMS)) {
      const uint2 four = compute(i / ITEMS, i % ITEMS);
      store_halves(output(i / ITEMS, i % ITEMS),
                   (static_cast<unsigned long long>(four.y) << 32 | four.x) | row_parity<N>(parities, i / ITEMS));
    }
    __syncwarp();
  }
  // Several items at once: one after another, each would be a trip to L2.
  __device__ __forceinline__ void receive() const {
    constexpr int PAIRS_OF_ROW = ITEMS / 2, AT_ONCE = 4;
    const int all = pass.rows * PAIRS_OF_ROW;
#pragma unroll 1
    for (int first = tid; first < all; first += AT_ONCE * THREADS) {
      Awaited<AT_ONCE> words;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = first + k * THREADS, row = i / PAIRS_OF_ROW;
        words.set(k, i < all && has<N>(active, row),
                  static_cast<int>(output(row, i % PAIRS_OF_ROW * 2) - reinterpret_cast<const half*>(scratch)),
                  row_parity<N>(parities, row));
      }
      words.ask(scratch);
      words.wait(scratch);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = first + k * THREADS;
        if (words.at[k] >= 0)
          *reinterpret_cast<uint4*>(&shared.input[i / PAIRS_OF_ROW][i % PAIRS_OF_ROW * 8]) = halves_of(words.words[k]);
      }
    }
    __syncwarp();
  }
};
