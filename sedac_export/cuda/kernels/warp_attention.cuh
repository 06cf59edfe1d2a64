// A warp's attention of two tokens over keys in shared memory, KEYS at a time: their query heads lie in the mma's rows
// as in attention.cuh, and every sum has the order that it has there.
#pragma once
#include "batch_rows.cuh"
#include "combine.cuh"

// KEYS keys of a head, and their values.
struct AttentionKeys {
  alignas(16) half keys[KEYS][HEAD_ROW];
  alignas(16) half values[KEYS][HEAD_ROW];
};

// `threads` threads, of which this one is number `thread`, ask for keys, or values, of a head of a slot: for those from
// `begin` on up to `stop`, of the KEYS from `first_key` on; zeros from `end` on, since nothing times NaN is NaN.
__device__ __forceinline__ void copy_rows(half (&to)[KEYS][HEAD_ROW], const half* cached, int first_key, int begin,
                                          int stop, int end, int thread, int threads) {
  constexpr int PARTS = HEAD / 8;
  for (int i = (begin - first_key) * PARTS + thread; i < (stop - first_key) * PARTS; i += threads) {
    const int key = first_key + i / PARTS, part = i % PARTS * 8;
    copy_16(shared_address(&to[i / PARTS][part]), cached + min(key, end - 1) * HEAD + part, key < end);
  }
}

struct WarpAttention {
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

  int window, position;  // of the first token; the second follows
  unsigned queries[HEAD / 16][4];

  // As the mma's lanes have them: head lane / 4 of each token. `first`, `second`: of the key-value head's group,
  // [GROUP][HEAD].
  __device__ __forceinline__ void load_queries(const half* first, const half* second) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const half* from = (part % 2 ? second : first) + lane / 4 * HEAD + k * 16 + part / 2 * 8 + lane % 4 * 2;
        queries[k][part] = lane / 4 < GROUP ? *reinterpret_cast<const unsigned*>(from) : 0;
      }
  }

  // `await_values` returns when the values are there.
  template <class Await>
  __device__ __forceinline__ void attend(Chunk& chunk, const AttentionKeys& from, int first_key,
                                         Await await_values) const {
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
    await_values();
    add_values(chunk, probabilities, before, from);
  }

  // What blocks exchange in attention.cuh, where words have a bit less.
  __device__ __forceinline__ static void end(Chunk& chunk, Partial& partial) {
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

 private:
  // Scores of keys that a row does not see are below all others.
  __device__ __forceinline__ void weigh(float (&score)[KEY_TILES][2][4], const AttentionKeys& from,
                                        int first_key) const {
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
        const int distance = position + upper - key;
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
                                             const float (&before)[2], const AttentionKeys& from) const {
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
};
