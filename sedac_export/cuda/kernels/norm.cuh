// What is done to numbers between products: the RMS norm of a whole row by one warp, and the MLP's activation.
#pragma once
#include "shape.cuh"
#include "words.cuh"

// What is published as halves is scaled by the factor of the row's norm before over this: room for a residual that
// grows by some thousands within half a layer, and small numbers are not subnormal.
constexpr float HEADROOM = 64;

template <int LANES>
__device__ __forceinline__ float sum_of_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// Where a norm takes its elements from, two at a time: what is there already,
template <class F>
struct ReadyPairs {
  F at;
  using Loaded = float2;
  __device__ __forceinline__ float2 load(int d) const { return at(d); }
  __device__ __forceinline__ bool here(float2) const { return true; }
  __device__ __forceinline__ float2 value(float2 v) const { return v; }
};
template <class F>
__device__ ReadyPairs(F) -> ReadyPairs<F>;

// the residual stream, whose words carry a parity,
struct StreamPairs {
  const float* from;
  unsigned parity;
  using Loaded = float2;
  __device__ __forceinline__ float2 load(int d) const { return load2(from + d); }
  __device__ __forceinline__ bool here(float2 v) const { return arrived(v, parity); }
  __device__ __forceinline__ float2 value(float2 v) const { return make_float2(unflagged(v.x), unflagged(v.y)); }
};

// or floats that each lie beside a number.
struct NumberedPairs {
  const ulonglong2* from;
  unsigned number;
  using Loaded = ulonglong2;
  __device__ __forceinline__ ulonglong2 load(int d) const { return load_words(from + d / 2); }
  __device__ __forceinline__ bool here(ulonglong2 v) const { return v.x >> 32 == number && v.y >> 32 == number; }
  __device__ __forceinline__ float2 value(ulonglong2 v) const {
    return make_float2(__uint_as_float(static_cast<unsigned>(v.x)), __uint_as_float(static_cast<unsigned>(v.y)));
  }
};

__device__ __forceinline__ float norm_factor(float squares) {
  return rsqrtf(squares * (1.f / HIDDEN) + SEDAC_NORM_EPSILON);
}

// By a warp: a row times `weight` and the norm's factor over HEADROOM, as halves. Returns the factor; where `scaled_by`
// is not 0, it takes the factor's place.
template <class Source>
__device__ __forceinline__ float normalise(int lane, half* to, const float* weight, float scaled_by, Source source) {
  constexpr int PAIRS = divided_up(HIDDEN, 64), AT_ONCE = PAIRS <= 16 ? PAIRS : 8;
  float2 v[AT_ONCE];
  const auto each = [&](int first, auto f) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
      if ((first + k) * 64 + 2 * lane < HIDDEN) f(k, (first + k) * 64 + 2 * lane);
  };
  const auto load = [&](int first) {
    typename Source::Loaded loaded[AT_ONCE];
    bool all;
    do {
      all = true;
      each(first, [&](int k, int d) { loaded[k] = source.load(d); });
      each(first, [&](int k, int) { all &= source.here(loaded[k]); });
    } while (!all);
    each(first, [&](int k, int) { v[k] = source.value(loaded[k]); });
  };
  float squares = 0;
#pragma unroll 1
  for (int first = 0; first < PAIRS; first += AT_ONCE) {
    load(first);
    each(first, [&](int k, int) { squares = fmaf(v[k].y, v[k].y, fmaf(v[k].x, v[k].x, squares)); });
  }
  const float factor = norm_factor(sum_of_lanes<32>(squares));
  const float scale = (scaled_by ? scaled_by : factor) * (1.f / HEADROOM);
#pragma unroll 1
  for (int first = 0; first < PAIRS; first += AT_ONCE) {
    if (PAIRS > AT_ONCE) load(first);
    each(first, [&](int k, int d) {
      const float2 w = *reinterpret_cast<const float2*>(weight + d);
      const unsigned halves = packed(v[k].x * w.x * scale, v[k].y * w.y * scale);
      *reinterpret_cast<unsigned*>(to + d) = d & 3 ? halves : with_room(halves);
    });
  }
  return factor;
}

// The activation of the MLP's gate.
__device__ __forceinline__ float activation(float gate) {
  if (SEDAC_GELU) return 0.5f * gate * (1.f + tanhf(0.7978845608f * fmaf(0.044715f * gate * gate, gate, gate)));
  return __fdividef(gate, 1.f + __expf(-gate));
}
