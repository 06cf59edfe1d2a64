// The two ways in which weights get from memory to a ring. A warp that waits for a piece sees no difference.
//
// Where registers move between warps, a warp beside the computing ones sends bulk copies, a lane for each ring.
// Elsewhere each computing warp fills its own ring by asynchronous copies of 16 bytes, which GPUs have from compute
// capability 8.0 on. (A block with sending warps would leave 168 registers to a thread there, and 76 to 352 bytes of
// spills with Qwen2.5-0.5B's shape; 256 threads have none with one row, and up to 236 with eight.)
#pragma once
#include "mma.cuh"

constexpr int SENDING_LANES = REGISTERS_MOVE ? 1 : 32;  // of a piece; its barrier counts them

__device__ __forceinline__ void init_barrier(unsigned barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(barrier), "n"(SENDING_LANES) : "memory");
}
// Makes initialised barriers visible to bulk copies.
__device__ __forceinline__ void publish_barriers() {
  if constexpr (REGISTERS_MOVE) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A piece of `bytes` is announced, copied in one or two parts, and concluded.
__device__ __forceinline__ void announce(unsigned barrier, int bytes) {
  if constexpr (REGISTERS_MOVE)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_weights(unsigned to, const char* from, int bytes, unsigned barrier) {
  if constexpr (REGISTERS_MOVE) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
  } else {
#pragma unroll 1
    for (int i = (threadIdx.x & 31) * 16; i < bytes; i += 1024) {
      asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + i), "l"(from + i) : "memory");
      if (SEDAC_WEIGHT_BITS == 16 || i + 512 < bytes)
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + i + 512), "l"(from + i + 512) : "memory");
    }
  }
}
__device__ __forceinline__ void conclude(unsigned barrier) {
  if constexpr (!REGISTERS_MOVE)
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier, unsigned parity) {
  if constexpr (REGISTERS_MOVE) {
    asm volatile(
        "{.reg .pred p;\n"
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:}" ::"r"(barrier),
        "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{.reg .pred p;\n"
        "AGAIN: mbarrier.test_wait.parity.shared::cta.b64 p,[%0],%1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:}" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }
}

// To the L2 cache. (Ordinary prefetches, a line each, were not tried.)
__device__ __forceinline__ void prefetch_weights(const char* from, int bytes) {
  if constexpr (REGISTERS_MOVE)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(from), "r"(bytes) : "memory");
}
