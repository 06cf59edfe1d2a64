// The clock. And where a layer's time goes: with SEDAC_PROFILE, when each warp of each block came to marked places of
// one layer.
#pragma once
#include "shape.cuh"

// In nanoseconds.
__device__ __forceinline__ unsigned long long now() {
  unsigned long long t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}

#ifdef SEDAC_PROFILE
constexpr int MARKS = 16;
extern "C" __device__ unsigned long long sedac_profile[MAX_BLOCKS][WARPS][MARKS];
__device__ unsigned long long sedac_profile[MAX_BLOCKS][WARPS][MARKS];
__device__ __forceinline__ void mark(int layer, int place) {
  const unsigned long long t = now();
  if (layer == LAYERS / 2 && !(threadIdx.x & 31)) sedac_profile[blockIdx.x][threadIdx.x >> 5][place] = t;
}
#define MARK(layer, place) mark(layer, place);
#else
#define MARK(layer, place)
#endif
