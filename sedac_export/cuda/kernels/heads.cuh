// What attention does with single numbers: a norm of heads and their rotation, and the scale of scores.
//
// A thread takes four numbers of a head: elements low, low + 1, high and high + 1, of queries and keys those that
// rotate into each other. Consecutive lanes take a head's quarters.
#pragma once
#include "norm.cuh"

// The elements low and high of a head's quarter `part`. `rotates`: whether it is a query or a key.
__device__ __forceinline__ int2 quarter_of_head(int part, bool rotates) {
  const bool in_pairs = rotates && part < ROTARY / 4;
  const int low = in_pairs ? 2 * part : rotates ? ROTARY + 4 * (part - ROTARY / 4) : 4 * part;
  return make_int2(low, low + (in_pairs ? ROTARY / 2 : 2));
}

// `cosine` and `sine`: those of the elements low and low + 1.
__device__ __forceinline__ void rotate(float2& u, float2& v, const float* cosine, const float* sine) {
  const float2 c = *reinterpret_cast<const float2*>(cosine), s = *reinterpret_cast<const float2*>(sine);
  const float2 x = u, y = v;
  u = make_float2(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y);
  v = make_float2(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y);
}

// RMS norm of a head.
__device__ __forceinline__ void normalise_head(float2& u, float2& v, const float* weight, int low, int high, int tid) {
  constexpr unsigned LANES = HEAD / 4;
  const int lane = tid & 31;
  const unsigned mask = LANES == 32 ? ~0u : ((1u << LANES % 32) - 1) << lane / LANES * LANES;
  float squares = fmaf(v.y, v.y, fmaf(v.x, v.x, fmaf(u.y, u.y, u.x * u.x)));
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) squares += __shfl_xor_sync(mask, squares, step);
  const float k = rsqrtf(squares * (1.f / HEAD) + SEDAC_NORM_EPSILON);
  u = make_float2(u.x * k * weight[low], u.y * k * weight[low + 1]);
  v = make_float2(v.x * k * weight[high], v.y * k * weight[high + 1]);
}

// 2 to the x, without exp2f's instructions for subnormal results, which are 0 here.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// A query times a key, as a score in base 2.
__device__ __forceinline__ float scaled(float score) {
  constexpr float TO_BASE_2 = 1.44269504f;
  if (SEDAC_ATTENTION_SOFTCAP != 0.f) {
    const float bounded = tanhf(score * (SEDAC_ATTENTION_SCALE / SEDAC_ATTENTION_SOFTCAP)) * SEDAC_ATTENTION_SOFTCAP;
    return bounded * TO_BASE_2;
  }
  return score * (SEDAC_ATTENTION_SCALE * TO_BASE_2);
}
