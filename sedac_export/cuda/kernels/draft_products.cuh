// What the stages of a trained drafter are made of: a barrier of the grid, inputs in shared memory, and products.
//
// A drafted token changes no text, so here sums may have any order and weights are read as the file has them: the
// simple way, with a barrier after each stage.
#pragma once
#include "blocks.cuh"
#include "grid_barrier.cuh"
#include "norm.cuh"
#include "race.cuh"

constexpr int DRAFT_WARPS = 16, DRAFT_THREADS = DRAFT_WARPS * 32;

// Hidden states of the model that a position has for a drafter, at most.
constexpr int MAX_FEATURES = 3;

// Positions that are taken in at once, whose normed hidden states lie in shared memory. Partial sums of attention that
// a head has at most.
constexpr int DRAFT_CHUNKS = 32;
constexpr int DRAFT_FIT = (SHARED_LIMIT - HEADS * DRAFT_CHUNKS * 4 - 2048) / (MAX_FEATURES * HIDDEN * 2);
constexpr int DRAFT_ROWS = DRAFT_FIT > MAX_ROWS ? MAX_ROWS : DRAFT_FIT;
static_assert(DRAFT_ROWS > 0, "shared memory is too small");

// Words of weights that a lane asks for at once, where it has one row.
constexpr int WEIGHTS_AT_ONCE = 12;

struct DraftShared {
  int followed[MAX_ROWS];  // the token after each position that is taken in
  float sums[DRAFT_ROWS][DRAFT_WARPS];
  float shares[HEADS][DRAFT_CHUNKS];
  int4 bests[2][DRAFT_WARPS];
  union {
    alignas(16) half input[larger(MAX_FEATURES * HIDDEN * DRAFT_ROWS, larger(INNER, ATTENTION))];
    alignas(16) float query[ATTENTION];
  };
};
static_assert(sizeof(DraftShared) <= SHARED_LIMIT, "shared memory is too small");

// What other blocks wrote in this launch: the L1 cache may hold what was there before.
__device__ __forceinline__ float load_result(const float* p) { return __ldcg(p); }

// Rows that the block norms: first all that it needs is asked for, then they become the input from `column` on, each
// times `weight` and its norm's factor; its rows lie `stride` apart.
template <int ROWS>
struct Normed {
  static constexpr int EACH = divided_up(HIDDEN, DRAFT_THREADS);
  float values[ROWS][EACH], weights[EACH];

  // `value(row, d)` for the first `rows` rows.
  template <class F>
  __device__ __forceinline__ void ask(int rows, const half* weight, F value) {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int d = threadIdx.x + k * DRAFT_THREADS;
      weights[k] = d < HIDDEN ? __half2float(weight[d]) : 0.f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) values[r][k] = r < rows && d < HIDDEN ? value(r, d) : 0.f;
    }
  }

  __device__ __forceinline__ void finish(DraftShared& shared, int column, int stride, float epsilon) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float squares = 0;
#pragma unroll
      for (int k = 0; k < EACH; k++) squares = fmaf(values[r][k], values[r][k], squares);
      squares = sum_of_lanes<32>(squares);
      if (!lane) shared.sums[r][warp] = squares;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float squares = sum_of_lanes<DRAFT_WARPS>(shared.sums[r][lane % DRAFT_WARPS]);
      const float factor = rsqrtf(squares * (1.f / HIDDEN) + epsilon);
#pragma unroll
      for (int k = 0; k < EACH; k++) {
        const int d = threadIdx.x + k * DRAFT_THREADS;
        if (d < HIDDEN) shared.input[r * stride + column + d] = __float2half(values[r][k] * factor * weights[k]);
      }
    }
    __syncthreads();
  }
};

// Eight halves times eight, added to `sum`.
__device__ __forceinline__ float dot(uint4 a, uint4 b, float sum) {
  const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 u = __half22float2(as_half2(x[i])), v = __half22float2(as_half2(y[i]));
    sum = fmaf(u.y, v.y, fmaf(u.x, v.x, sum));
  }
  return sum;
}

// By a warp: rows of weights, `distance` apart, times `ROWS` rows of `columns` halves, `COLUMNS` at most, `stride`
// apart. All lanes get the sums.
template <int ROWS, int OUTPUTS, int COLUMNS>
__device__ __forceinline__ void multiply_rows(float (&sums)[OUTPUTS][ROWS], const half* weights, size_t distance,
                                              const half* input, int stride, int columns = COLUMNS) {
  constexpr int EACH = divided_up(COLUMNS, 256), FIT = ROWS == 1 ? WEIGHTS_AT_ONCE / OUTPUTS : 2;
  constexpr int AT_ONCE = EACH < FIT ? EACH : FIT;
#pragma unroll
  for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[o][r] = 0;
  const int lane = (threadIdx.x & 31) * 8;
#pragma unroll 1
  for (int first = 0; first < EACH; first += AT_ONCE) {
    uint4 w[AT_ONCE][OUTPUTS];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int d = lane + (first + k) * 256;
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++)
        if (d < columns) w[k][o] = __ldg(reinterpret_cast<const uint4*>(weights + o * distance + d));
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int d = lane + (first + k) * 256;
      if (d >= columns) break;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint4 x = *reinterpret_cast<const uint4*>(input + r * stride + d);
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) sums[o][r] = dot(w[k][o], x, sums[o][r]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[o][r] = sum_of_lanes<32>(sums[o][r]);
}

// As numbers of floats' order.
__device__ __forceinline__ unsigned ordered(float v) {
  const int bits = __float_as_int(v);
  return static_cast<unsigned>(bits ^ (bits >> 31 | static_cast<int>(0x80000000)));
}
__device__ __forceinline__ float of_ordered(unsigned v) {
  return __int_as_float(static_cast<int>(v & 0x80000000 ? v ^ 0x80000000 : ~v));
}
// Of a warp; none is NaN.
__device__ __forceinline__ float largest_of_lanes(float v) { return of_ordered(__reduce_max_sync(~0u, ordered(v))); }

// A half that is finite where the float is.
__device__ __forceinline__ half bounded_half(float v) { return __float2half(fminf(fmaxf(v, -65504.f), 65504.f)); }
