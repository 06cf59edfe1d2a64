// The residual stream. Whoever has a tile of O or of down adds it to what the residual was before, and publishes the
// sum; every block reads all of it twice a layer, for the norms. So each block also has what an exit is decided by, and
// all decide the same.
#pragma once
#include "shared.cuh"

// Whether row `row` of up to N is in `rows`.
template <int N>
__device__ __forceinline__ bool has(unsigned rows, int row) {
  return rows >> (N == 1 ? 0 : row) & 1;
}

// The elements of a row that this thread holds: f(pair, first element).
template <class F>
__device__ __forceinline__ void for_pairs(int tid, F f) {
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int d = 2 * tid + 2 * THREADS * p;
    if (d < HIDDEN) f(p, d);
  }
}

// f(row, pair - first pair, part, element) for the thread's words of `rows`.
template <int ROWS, int AT_ONCE, class F>
__device__ __forceinline__ void for_words(int tid, int first_pair, unsigned rows, int parts, F f) {
#pragma unroll
  for (int t = 0; t < ROWS; t++)
    if (has<ROWS>(rows, t))
#pragma unroll
      for (int p = 0; p < AT_ONCE; p++) {
        const int d = 2 * tid + 2 * THREADS * (first_pair + p);
        if (first_pair + p < PAIRS && d < HIDDEN)
#pragma unroll
          for (int k = 0; k < DOWN_SPLITS; k++)
            if (k < parts) f(t, p, k, d);
      }
}

// The residual of `rows`, as it arrives: the sum of `parts` vectors, which begin at from(row) in the row's scratch and
// have flags of parity(row). A poll is a trip to L2, some 0.7 us, so it asks for as many words at once as registers
// allow: of two rows, four spill, and of all pairs where they are few. (Pair after pair, and down's activations piece
// after piece: 512 us for the layers of Qwen2.5-0.5B's shape; so: 478.)
template <int N, class From, class Parity>
__device__ __forceinline__ void receive(int tid, float2 (&h)[N][PAIRS], const float* scratch, From from, int parts,
                                        Parity parity, unsigned rows) {
  constexpr int ROWS = N < 4 ? N : 2, AT_ONCE = PAIRS <= 2 || N == 1 ? (PAIRS < 4 ? PAIRS : 4) : 1;
  tid = fresh<N>(tid);
#pragma unroll
  for (int base = 0; base < N; base += ROWS) {
    const unsigned mine = rows >> base & ((1u << ROWS) - 1);
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair += AT_ONCE) {
      float2 v[ROWS][AT_ONCE][DOWN_SPLITS];
      bool all;
      do {
        all = true;
        for_words<ROWS, AT_ONCE>(tid, pair, mine, parts, [&](int t, int p, int k, int d) {
          v[t][p][k] = load2(scratch + (base + t) * SCRATCH_ROW + from(base + t) + k * HIDDEN + d);
        });
        for_words<ROWS, AT_ONCE>(tid, pair, mine, parts,
                                 [&](int t, int p, int k, int) { all &= arrived(v[t][p][k], parity(base + t)); });
        if (!all) pause();
      } while (!all);
      for_words<ROWS, AT_ONCE>(tid, pair, mine, parts, [&](int t, int p, int k, int) {
        float2& to = h[base + t][pair + p];
        const float x = unflagged(v[t][p][k].x), y = unflagged(v[t][p][k].y);
        to = k ? make_float2(to.x + x, to.y + y) : make_float2(x, y);
      });
    }
  }
  __syncwarp();
}

// Sums over the block of one number a row, in one order for every N. Afterwards lanes 4t to 4t + 3 hold row t's.
template <int N>
struct RowSums {
  // Before the block's barrier: each warp's sums to `segments` [MAX_ROWS][WARPS].
  static __device__ __forceinline__ void store(int tid, float (&q)[N], float* segments) {
    const int warp = tid >> 5, lane = tid & 31;
    int step = 16;
#pragma unroll
    for (int n = N; n > 1; step >>= 1) {  // halve the rows that a lane sums with each step
      n /= 2;
      const bool upper = lane & step;
#pragma unroll
      for (int i = 0; i < n; i++) {
        const float send = upper ? q[i] : q[i + n], keep = upper ? q[i + n] : q[i];
        q[i] = keep + __shfl_xor_sync(~0u, send, step);
      }
    }
#pragma unroll
    for (int r = N; r < 32; r *= 2) q[0] += __shfl_xor_sync(~0u, q[0], 16 / r);
    if (lane % (32 / N) == 0) segments[lane / (32 / N) * WARPS + warp] = q[0];
  }
  // After it.
  static __device__ __forceinline__ float load(int tid, const float* segments) {
    const float2 s = *reinterpret_cast<const float2*>(segments + (tid & 31) * 2);
    float r = s.x + s.y;
    r += __shfl_xor_sync(~0u, r, 1);
    return r + __shfl_xor_sync(~0u, r, 2);
  }
};
static_assert(WARPS == 8 && MAX_ROWS == 8, "RowSums: a lane loads two of a row's eight sums");

// Before the block's barrier: each warp's sums of h squared.
template <int N>
__device__ __forceinline__ void store_squares(int tid, const float2 (&h)[N][PAIRS], float* segments) {
  float q[N];
#pragma unroll
  for (int t = 0; t < N; t++) {
    q[t] = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) q[t] = fmaf(h[t][p].y, h[t][p].y, fmaf(h[t][p].x, h[t][p].x, q[t]));
  }
  RowSums<N>::store(tid, q, segments);
}

// The norm of what attention or the MLP gives, before it is added: h = before(row, element) + rmsnorm(h) * weight.
template <int N, class Before>
__device__ __forceinline__ void add_normalised(int tid, float2 (&h)[N][PAIRS], unsigned rows, const float* weight,
                                               float* segments, Before before) {
  store_squares<N>(tid, h, segments);
  sync_block();
  const float factor = rsqrtf(RowSums<N>::load(tid, segments) * (1.f / HIDDEN) + SEDAC_NORM_EPSILON);
#pragma unroll
  for (int t = 0; t < N; t++) {
    const float k = __shfl_sync(~0u, factor, t * 4);
    if (has<N>(rows, t))
      for_pairs(fresh<N>(tid), [&](int p, int d) {
        const float2 old = before(t, d), w = *reinterpret_cast<const float2*>(weight + d);
        h[t][p] = make_float2(old.x + h[t][p].x * k * w.x, old.y + h[t][p].y * k * w.y);
      });
  }
}

// What a layer's stability is computed from: products of its input x0 and its output.
template <int N>
struct Stability {
  float inner[N], before[N];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < N; t++) inner[t] = before[t] = 0;
  }
  __device__ __forceinline__ void note(int t, float2 x0, float2 h) {
    inner[t] = fmaf(x0.y, h.y, fmaf(x0.x, h.x, inner[t]));
    before[t] = fmaf(x0.y, x0.y, fmaf(x0.x, x0.x, before[t]));
  }
};

// x = rmsnorm(h) * weight, as halves. Where `compared`, returns (cos(x0, h) + 1) / 2 of row t in lane 4t.
template <int N>
__device__ __forceinline__ float normalise(int tid, const float2 (&h)[N][PAIRS], const float2 (&weight)[PAIRS],
                                           half (*x)[INPUT], float (*segments)[MAX_ROWS * WARPS],
                                           Stability<N>& stability, bool compared) {
  store_squares<N>(tid, h, segments[0]);
  if (compared)
    RowSums<N>::store(tid, stability.inner, segments[1]), RowSums<N>::store(tid, stability.before, segments[2]);
  sync_block();
  const float squares = RowSums<N>::load(tid, segments[0]);
  float value = 0;
  if (compared) {
    const float inner = RowSums<N>::load(tid, segments[1]), before = RowSums<N>::load(tid, segments[2]);
    value = fmaf(inner * rsqrtf(before * squares), 0.5f, 0.5f);
  }
  const float factor = rsqrtf(squares * (1.f / HIDDEN) + SEDAC_NORM_EPSILON);
#pragma unroll
  for (int t = 0; t < N; t++) {
    const float k = __shfl_sync(~0u, factor, t * 4);
    for_pairs(fresh<N>(tid), [&](int p, int d) {
      *reinterpret_cast<unsigned*>(&x[t][d]) = packed(h[t][p].x * k * weight[p].x, h[t][p].y * k * weight[p].y);
    });
  }
  sync_block();
  return value;
}
