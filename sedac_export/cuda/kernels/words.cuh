// Words that cross blocks carry their own flag.
//
// Blocks exchange results through global memory without a barrier: the lowest bit of a word is the parity of the layer
// that wrote it, and readers poll the very words they need. It costs one of a float's 23 bits, or of one half in four.
// (Five grid barriers a layer instead: 799 us a token of Qwen2.5-0.5B's shape against 481.)
//
// A word is written once a layer, so its parity alternates. Nobody runs ahead by more than a layer, since the norm
// needs the whole residual stream, of which every block computes a part; `down`, which blocks without a QKV tile read
// late, has two buffers. A pass begins with all flags unset: the pass before cleared its scratch.
//
// A warp must reconverge (__syncwarp) between its stores and its next poll, or the polling lanes hold up the storing
// ones.
#pragma once
#include "profile.cuh"

__device__ __forceinline__ float2 load2(const float* p) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1},[%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ float4 load4(const float* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3},[%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p));
  return v;
}
// Eight halves; one flag for each four.
__device__ __forceinline__ ulonglong2 load_halves(const half* p) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1},[%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ void store1(float* p, float v) {
  asm volatile("st.relaxed.gpu.global.f32 [%0],%1;" ::"l"(p), "f"(v) : "memory");
}
__device__ __forceinline__ void store2(float* p, float x, float y) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0],{%1,%2};" ::"l"(p), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_halves(half* p, unsigned long long v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ bool arrived(float2 v, unsigned parity) {
  return !(((__float_as_uint(v.x) ^ parity) | (__float_as_uint(v.y) ^ parity)) & 1);
}
__device__ __forceinline__ bool arrived(float4 v, unsigned parity) {
  return !(((__float_as_uint(v.x) ^ parity) | (__float_as_uint(v.y) ^ parity) | (__float_as_uint(v.z) ^ parity) |
            (__float_as_uint(v.w) ^ parity)) &
           1);
}
__device__ __forceinline__ bool arrived(ulonglong2 v, unsigned parity) {
  return !(((v.x ^ parity) | (v.y ^ parity)) & 1);
}
__device__ __forceinline__ float flagged(float v, unsigned parity) {
  return __uint_as_float((__float_as_uint(v) & ~1u) | parity);
}
// The value without its flag: it must not depend on the layer's number in the pass.
__device__ __forceinline__ float unflagged(float v) { return __uint_as_float(__float_as_uint(v) & ~1u); }

// The barrier of the warps that compute.
__device__ __forceinline__ void sync_block() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Between two polls. (0, 20, 50 and 100 ns took the same time within 2 %; sleeping longer was slower.)
__device__ __forceinline__ void pause() { __nanosleep(50); }

__device__ __forceinline__ unsigned packed(float a, float b) {
  const half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&v);
}

// The thread's index, read anew: otherwise the compiler computes hundreds of addresses before the loop over layers and
// spills them. It takes some 30 cycles, so it is read once a stage where registers allow.
__device__ __forceinline__ int thread_index() {
  int i;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(i));
  return i;
}
template <int N>
__device__ __forceinline__ int fresh(int tid) {
  return N > 0 ? thread_index() : tid;
}
__device__ __forceinline__ int block_index() {
  int i;
  asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(i));
  return i;
}
