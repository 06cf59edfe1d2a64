// Prefill's attention: a block takes some tokens of a key-value head over all keys, KEYS at a time, and a warp two of
// the tokens, whose query heads lie in the mma's rows as in attention.cuh.
//
// The chunks that attention.cuh spreads over blocks come one after another here, and are added as combine.cuh does, so
// every sum has the same order.
#pragma once
#include "combine.cuh"
#include "prefill.cuh"

// Of a block. (A layer's attention of 256 tokens behind 2000 with 2, 4 and 8 warps: SmolLM2's shape 48, 42 and 64 us,
// Mistral-7B's 245, 164 and 170. With a block for each two tokens, whose warps shared keys and columns, SmolLM2's took
// 132 behind 3000 and 58 since.)
constexpr int ATTENTION_WARPS = 4, ATTENTION_THREADS = ATTENTION_WARPS * 32, ATTENTION_TOKENS = 2 * ATTENTION_WARPS;

struct PrefillKeys {
  alignas(16) half keys[KEYS][HEAD_ROW];
  alignas(16) half values[KEYS][HEAD_ROW];
};
// The next keys come while others are read.
constexpr int PREFILL_ATTENTION_BYTES = 2 * sizeof(PrefillKeys);
static_assert(HEAD <= 128 && PREFILL_ATTENTION_BYTES <= SHARED_LIMIT, "a warp's registers hold the sums of two tokens");

struct PrefillAttention {
  static constexpr int UNITS = HEAD / 8;  // of 16 rows by 8 columns

  // Of a chunk's keys so far: sums of values over the even and the odd tiles of keys; of both rows the largest score,
  // and the sum of probabilities relative to it.
  struct Chunk {
    float even[UNITS][4] = {}, odd[UNITS][4] = {};
    float largest[2] = {-1e30f, -1e30f}, total[2] = {0, 0};
  };
  // A chunk that has ended.
  struct Partial {
    float sums[UNITS][4], largest[2], total[2];
  };

  const PrefillPass& pass;
  PrefillKeys* memory;        // [2]
  const half *keys, *values;  // of the head
  int window, kv_head;
  int row;  // the warp's first
  unsigned queries[HEAD / 16][4];
  // Of both rows, all chunks that were added.
  float largest[2] = {-1e30f, -1e30f}, total[2] = {0, 0}, sum[UNITS][4] = {};

  __device__ __forceinline__ PrefillAttention(const PrefillPass& pass, const Layer& layer, PrefillKeys* memory)
      : pass(pass), memory(memory), window(layer.window), kv_head(blockIdx.y) {
    const size_t first = (static_cast<size_t>(pass.slot) * KV_HEADS + kv_head) * pass.capacity * HEAD;
    keys = layer.keys + first, values = layer.values + first;
    row = blockIdx.x * ATTENTION_TOKENS + threadIdx.x / 32 * 2;
    load_queries();
  }

  __device__ __forceinline__ void run() {
    const int first_row = blockIdx.x * ATTENTION_TOKENS, last_row = min(first_row + ATTENTION_TOKENS, pass.rows) - 1;
    const int seen = window ? max(pass.start + first_row - window + 1, 0) : 0;
    const int first = seen / KEYS, last = (pass.start + last_row) / KEYS;  // keys, KEYS at a time
    const int of_chunk = 1 << chunk_shift(pass.capacity) - (KEYS == 64 ? 6 : 7);
    Partial partials[CHUNKS_ADDED];
    Chunk chunk;
    int begun = 0, ended = 0;  // of `partials`
    copy(first, first);
#pragma unroll 1
    for (int at = first; at <= last; at++) {
      wait_for_copies<0>();
      __syncthreads();
      if (at < last) copy(at + 1, first);
      attend(chunk, memory[(at - first) % 2], at * KEYS);
      if ((at + 1) % of_chunk && at < last) continue;
      const int number = at / of_chunk % CHUNKS_ADDED;
      if (begun == ended) begun = number;
      end_chunk(chunk, partials[number]);
      ended = number + 1;
      if (ended < CHUNKS_ADDED && at < last) continue;
      add_chunks(partials, begun, ended);
      begun = ended = 0;
    }
    write();
  }

 private:
  // As the mma's lanes have them: head lane / 4 of the first token and of the second.
  __device__ __forceinline__ void load_queries() {
    const int lane = threadIdx.x % 32, head = kv_head * GROUP + lane / 4;
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const half* from = pass.scratch->queries[min(row + part % 2, pass.rows - 1)] + head * HEAD;
        const int column = k * 16 + part / 2 * 8 + lane % 4 * 2;
        queries[k][part] = lane / 4 < GROUP ? *reinterpret_cast<const unsigned*>(from + column) : 0;
      }
  }

  // Asks for KEYS keys and their values; zeros where there are none, since nothing times NaN is NaN.
  __device__ __forceinline__ void copy(int at, int first) {
    constexpr int PARTS = HEAD / 8;
    PrefillKeys& to = memory[(at - first) % 2];
    const int first_key = at * KEYS, there = pass.start + pass.rows - first_key;
    for (int i = threadIdx.x; i < KEYS * PARTS; i += ATTENTION_THREADS) {
      const int key = i / PARTS, part = i % PARTS * 8, from = (first_key + min(key, there - 1)) * HEAD + part;
      copy_16(shared_address(&to.keys[key][part]), keys + from, key < there);
      copy_16(shared_address(&to.values[key][part]), values + from, key < there);
    }
    end_copies();
  }

  __device__ __forceinline__ void attend(Chunk& chunk, const PrefillKeys& from, int first_key) const {
    float score[KEY_TILES][2][4];
    weigh(score, from, first_key);
    float before[2];
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      float x = chunk.largest[upper];
#pragma unroll
      for (int i = 0; i < KEY_TILES * 4; i++) x = fmaxf(x, score[i / 4][i / 2 % 2][upper * 2 + i % 2]);
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
      before[upper] = power_of_2(chunk.largest[upper] - x);
      chunk.largest[upper] = x;
    }
    unsigned probabilities[KEY_TILES][4];
    make_probabilities(chunk, score, before, probabilities);
    add_values(chunk, probabilities, before, from);
  }

  // Scores of keys that a row does not see are below all others.
  __device__ __forceinline__ void weigh(float (&score)[KEY_TILES][2][4], const PrefillKeys& from, int first_key) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const unsigned keys = shared_address(from.keys);
#pragma unroll
    for (int tile = 0; tile < KEY_TILES; tile++) {
#pragma unroll
      for (int e = 0; e < 8; e++) score[tile][e / 4][e % 4] = 0;
#pragma unroll
      for (int k = 0; k < HEAD / 16; k++) {
        unsigned b[4];
        load_matrix(b,
                    keys + ((tile * 16 + (lane & 7) + (lane >> 4) * 8) * HEAD_ROW + k * 16 + (lane >> 3 & 1) * 8) * 2);
        const unsigned (&a)[4] = queries[k];
        mma(score[tile][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma(score[tile][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int upper = e / 2 % 2, key = first_key + tile * 16 + e / 4 * 8 + 2 * t + e % 2;
        const int distance = pass.start + row + upper - key;
        float& v = score[tile][e / 4][e % 4];
        v = distance >= 0 && (!window || distance < window) ? scaled(v) : -1e30f;
      }
    }
  }

  // As the mma's lanes have them, and their sum. before: by what the chunk's earlier sums are to be scaled.
  __device__ __forceinline__ static void make_probabilities(Chunk& chunk, const float (&score)[KEY_TILES][2][4],
                                                            const float (&before)[2],
                                                            unsigned (&probabilities)[KEY_TILES][4]) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      float of_keys = 0;
#pragma unroll
      for (int tile = 0; tile < KEY_TILES; tile++) {
        float of_tile = 0;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float p = score[tile][n][upper * 2], q = score[tile][n][upper * 2 + 1];
          p = p > -1e29f ? power_of_2(p - chunk.largest[upper]) : 0.f;
          q = q > -1e29f ? power_of_2(q - chunk.largest[upper]) : 0.f;
          of_tile += p + q;
          probabilities[tile][n * 2 + upper] = packed(p, q);
        }
        of_tile += __shfl_xor_sync(~0u, of_tile, 1);
        of_tile += __shfl_xor_sync(~0u, of_tile, 2);
        of_keys += of_tile;
      }
      chunk.total[upper] = chunk.total[upper] * before[upper] + of_keys;
    }
  }

  __device__ __forceinline__ void add_values(Chunk& chunk, const unsigned (&probabilities)[KEY_TILES][4],
                                             const float (&before)[2], const PrefillKeys& from) const {
    const unsigned values = shared_address(from.values);
#pragma unroll
    for (int q = 0; q < UNITS; q++) {
#pragma unroll
      for (int e = 0; e < 4; e++) chunk.even[q][e] *= before[e / 2], chunk.odd[q][e] *= before[e / 2];
#pragma unroll
      for (int k = 0; k < KEYS / 32; k++) {
        unsigned v[4];
        load_transposed(v, values + ((k * 32 + threadIdx.x % 32) * HEAD_ROW + q * 8) * 2);
        const unsigned (&a)[4] = probabilities[2 * k], (&b)[4] = probabilities[2 * k + 1];
        mma(chunk.even[q], a[0], a[1], a[2], a[3], v[0], v[1]);
        mma(chunk.odd[q], b[0], b[1], b[2], b[3], v[2], v[3]);
      }
    }
  }

  // What blocks exchange in attention.cuh, where words have a bit less.
  __device__ __forceinline__ static void end_chunk(Chunk& chunk, Partial& partial) {
#pragma unroll
    for (int i = 0; i < UNITS * 4; i++)
      partial.sums[i / 4][i % 4] = unflagged(chunk.even[i / 4][i % 4] + chunk.odd[i / 4][i % 4]);
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      partial.largest[upper] = unflagged(chunk.largest[upper]);
      partial.total[upper] = unflagged(chunk.total[upper]);
    }
    chunk = {};
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
      if (g >= GROUP || row + upper >= pass.rows) continue;
      const float f = 1.f / total[upper];
#pragma unroll
      for (int q = 0; q < UNITS; q++) {
        const unsigned halves = packed(sum[q][2 * upper] * f, sum[q][2 * upper + 1] * f);
        half* to = pass.scratch->input[row + upper] + (kv_head * GROUP + g) * HEAD + q * 8 + 2 * t;
        *reinterpret_cast<unsigned*>(to) = t % 2 ? halves : halves & ~1u;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    prefill_attention(const __grid_constant__ PrefillPass pass, int layer, int) {
  extern __shared__ __align__(128) unsigned char memory[];
  PrefillAttention(pass, pass.layers[layer], reinterpret_cast<PrefillKeys*>(memory)).run();
}
