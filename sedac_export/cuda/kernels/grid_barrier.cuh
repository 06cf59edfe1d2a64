// A barrier of all blocks that share a count.
#pragma once

// Blocks of a cooperative launch. `arrived` counts for as long as the module is loaded, and is a multiple of the blocks
// between launches. (Eight tokens of SmolLM2's drafter took 287 us; 305 with a fence and an atomic addition in
// place of the release, and with norms' weights and residuals asked for where they are used. With a count for each
// block, which 132 threads of every block read, a token took 53 us instead of 34; with weights asked for before each
// barrier 35 to 50, since they need registers that spill, and before a stage's input, within them or by copies to
// shared memory, as long as without.)
struct GridBarrier {
  unsigned long long* arrived;
  unsigned long long target;

  __device__ __forceinline__ GridBarrier(unsigned long long* arrived, int blocks) : arrived(arrived) {
    // others may have arrived at the first barrier, but not all
    target = threadIdx.x ? 0 : load() / blocks * blocks;
  }
  __device__ __forceinline__ void wait(int blocks) {
    __syncthreads();
    if (!threadIdx.x) {
      target += blocks;
      asm volatile("red.release.gpu.global.add.u64 [%0],1;" ::"l"(arrived) : "memory");
      while (load() < target) {
      }
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ unsigned long long load() const {
    unsigned long long v;
    asm volatile("ld.acquire.gpu.global.u64 %0,[%1];" : "=l"(v) : "l"(arrived) : "memory");
    return v;
  }
};
