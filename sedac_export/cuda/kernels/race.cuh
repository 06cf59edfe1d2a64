// The sampler's race on the device: which token sedac-core/src/sampler/race.rs would choose if it saw all logits.
//
// There, the token with the smallest -ln(u) / exp(logit / temperature) wins, in fp64, of uniform numbers u that follow
// from a key. Here it is the one with the largest logit / temperature - ln(-ln(u)), in fp32. The winner is the host's
// where it leads by more than both sides' rounding, some 1e-4; elsewhere the host reads the logits.
#pragma once
#include "words.cuh"

#define INFINITE __int_as_float(0x7f800000)

// -ln(-ln(u)), to 2^-21 + 2^-23 of itself: u is known as an integer, so that 1 - u is exact where u is close to 1.
__device__ __forceinline__ float race_noise(unsigned long long key, unsigned token) {
  unsigned long long z = key + token * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z = (z ^ (z >> 31)) >> 11;
  // the host's u is (z + 1/2) / 2^53, which from 1/2 on is rounded to an even number of 2^-53
  const unsigned long long rest = ((1ull << 53) - z) & ~1ull;
  const float below = __ull2float_rn(2 * z + 1) * 0x1p-54f, above = __ull2float_rn(rest) * 0x1p-53f;
  return -logf(z >> 52 ? -log1pf(-above) : -logf(below));
}

// The best of some tokens, and by how much.
struct Race {
  float score = -INFINITE, second = -INFINITE;
  float logit = 0;
  unsigned token = 0;

  __device__ __forceinline__ void note(float other, unsigned at, const RowRace& by) {
    merge({fmaf(other, by.inverse_temperature, race_noise(by.key, at)), -INFINITE, other, at});
  }
  __device__ __forceinline__ void merge(const Race& other) {
    const bool theirs = other.score > score;
    second = fmaxf(fmaxf(second, other.second), theirs ? score : other.score);
    if (theirs) score = other.score, logit = other.logit, token = other.token;
  }
  // With 1 / temperature rounded and fp32 sums, a score is off by up to 2^-23 of itself and 2^-17, and the host's, of
  // tokens that can win, by up to 2^-17; the bound is of two tokens' scores together.
  __device__ __forceinline__ bool is_certain() const { return score - second > fabsf(score) * 0x1p-21f + 0x1p-14f; }

  __device__ __forceinline__ int4 words() const {
    return make_int4(__float_as_int(score), __float_as_int(second), __float_as_int(logit), static_cast<int>(token));
  }
  __device__ __forceinline__ static Race of(int4 v) {
    return {__int_as_float(v.x), __int_as_float(v.y), __int_as_float(v.z), static_cast<unsigned>(v.w)};
  }
};

// The best of this lane and of the one `step` away.
template <class Best>
__device__ __forceinline__ void merge_lanes(Best& best, int step) {
  const int4 v = best.words();
  best.merge(Best::of(make_int4(__shfl_xor_sync(~0u, v.x, step), __shfl_xor_sync(~0u, v.y, step),
                                __shfl_xor_sync(~0u, v.z, step), __shfl_xor_sync(~0u, v.w, step))));
}
