// Words that cross blocks carry their own flag.
//
// Blocks exchange results through global memory without a barrier: the lowest bit of a word is the parity of the layer
// that wrote it, and readers poll the very words they need. It costs one of a float's 23 bits, or of one half in four.
// (Five grid barriers a layer instead: 799 us a token of Qwen2.5-0.5B's shape against 481.)
//
// Polls follow one another at once. (With 50 ns of sleep in between, since sectors are as in shape.cuh: SmolLM2's shape
// 397 us a token instead of 388, for eight rows 545 instead of 524.)
//
// A word is written once a layer, so its parity alternates. Nobody runs ahead by more than a layer: a tile of down
// needs all activations, of which every block computes some, after it has read what came before. A pass begins with all
// flags unset: the pass before cleared its scratch.
//
// A warp must reconverge (__syncwarp) between its stores and its next poll, or the polling lanes hold up the storing
// ones.
#pragma once
#include "profile.cuh"

__device__ __forceinline__ float load1(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0,[%1];" : "=f"(v) : "l"(p));
  return v;
}
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
__device__ __forceinline__ ulonglong2 load_words(const ulonglong2* p) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1},[%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
// Eight halves; one flag for each four.
__device__ __forceinline__ ulonglong2 load_halves(const half* p) {
  return load_words(reinterpret_cast<const ulonglong2*>(p));
}
__device__ __forceinline__ void store_words(ulonglong2* p, unsigned long long x, unsigned long long y) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0],{%1,%2};" ::"l"(p), "l"(x), "l"(y) : "memory");
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

// The halves without their flags.
__device__ __forceinline__ uint4 halves_of(ulonglong2 v) {
  return make_uint4(static_cast<unsigned>(v.x) & ~1u, static_cast<unsigned>(v.x >> 32),
                    static_cast<unsigned>(v.y) & ~1u, static_cast<unsigned>(v.y >> 32));
}

// The lowest bit says whether a word of v is still that of the layer before; the others mean nothing. So those of
// several values are joined by | and tested once. (Joined as conditions they took several times the instructions, and
// code that is fetched cold is latency. With combine.cuh's advancing pointers, us a token for one row and for eight:
// SmolLM2's shape 439 and 659 before, 427 and 611 since; Qwen2.5-0.5B's 549 and 805, 532 and 731.)
__device__ __forceinline__ unsigned stale(float v, unsigned parity) { return __float_as_uint(v) ^ parity; }
__device__ __forceinline__ unsigned stale(float2 v, unsigned parity) { return stale(v.x, parity) | stale(v.y, parity); }
__device__ __forceinline__ unsigned stale(float4 v, unsigned parity) {
  return stale(v.x, parity) | stale(v.y, parity) | stale(v.z, parity) | stale(v.w, parity);
}
__device__ __forceinline__ unsigned stale(ulonglong2 v, unsigned parity) {
  return (static_cast<unsigned>(v.x) ^ parity) | (static_cast<unsigned>(v.y) ^ parity);
}
template <class T>
__device__ __forceinline__ bool arrived(T v, unsigned parity) {
  return !(stale(v, parity) & 1);
}
__device__ __forceinline__ float flagged(float v, unsigned parity) {
  return __uint_as_float((__float_as_uint(v) & ~1u) | parity);
}
// The value without its flag: it must not depend on the layer's number in the pass.
__device__ __forceinline__ float unflagged(float v) { return __uint_as_float(__float_as_uint(v) & ~1u); }

// Three words with their flags, and one that has nothing else.
__device__ __forceinline__ void store4(float* p, float x, float y, float z, unsigned parity) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0],{%1,%2,%3,%4};" ::"l"(p), "f"(flagged(x, parity)),
               "f"(flagged(y, parity)), "f"(flagged(z, parity)), "f"(flagged(0.f, parity))
               : "memory");
}

// Words of eight halves that a thread waits for: asked for together, and again until all are there.
template <int COUNT>
struct Awaited {
  int at[COUNT];          // halves from the beginning of the scratch, -1 for none
  unsigned parities = 0;  // a bit each
  ulonglong2 words[COUNT];

  __device__ __forceinline__ void set(int k, bool wanted, int halves, unsigned parity) {
    at[k] = wanted ? halves : -1;
    parities |= (parity & 1) << k;
  }
  __device__ __forceinline__ void ask(const float* scratch) {
#pragma unroll
    for (int k = 0; k < COUNT; k++)
      if (at[k] >= 0) words[k] = load_halves(reinterpret_cast<const half*>(scratch) + at[k]);
  }
  __device__ __forceinline__ unsigned stale_bits() const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < COUNT; k++)
      if (at[k] >= 0) bits |= stale(words[k], parities >> k);
    return bits;
  }
  // Waits for words that were asked for.
  __device__ __forceinline__ void wait(const float* scratch) {
    while (stale_bits() & 1) ask(scratch);
  }
};

// The barrier of the warps that compute.
__device__ __forceinline__ void sync_block() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ unsigned packed(float a, float b) {
  const half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&v);
}

// The half in the lower bits without its lowest: to the nearest, of two to the even one. NaN stays NaN.
__device__ __forceinline__ unsigned with_room(unsigned v) {
  const unsigned up = (v & 0x7fff) > 0x7c00 ? 0 : v >> 1 & v & 1;
  return (v + up) & ~1u;
}

// Numbers of four lanes, from one with `of_four` 0 on, as four halves in that lane; the lowest bit is free for a flag.
__device__ __forceinline__ unsigned long long packed_lanes(float v, int of_four) {
  unsigned word = __half_as_ushort(__float2half(v));
  if (!of_four) word = with_room(word);
  word |= __shfl_down_sync(~0u, word, 1) << 16;
  const unsigned upper = __shfl_down_sync(~0u, word, 2);
  return static_cast<unsigned long long>(upper) << 32 | word;
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
