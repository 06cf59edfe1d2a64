// In place of the chain, so that compiling takes no time: its entries, its facts, and a use of every macro.
#include <cuda_fp16.h>
#include "facts.cuh"

static_assert(SEDAC_HIDDEN % 32 == 0 && SEDAC_HEADS * SEDAC_HEAD_SIZE % 32 == 0 && SEDAC_INTERMEDIATE % 32 == 0, "sizes");
static_assert(SEDAC_KEY_VALUE_HEADS > 0 && SEDAC_ROTARY_SIZE > 0 && SEDAC_LAYERS > 0 && SEDAC_VOCABULARY > 0, "sizes");
static_assert(SEDAC_GELU <= 1 && SEDAC_QUERY_KEY_NORM <= 1 && SEDAC_ROTARY_TABLES > 0, "options");

template <int ROWS> __device__ void chain(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = SEDAC_NORM_EPSILON + SEDAC_ATTENTION_SCALE + SEDAC_ATTENTION_SOFTCAP;
  __syncthreads();
  const float other = shared[threadIdx.x ^ ROWS] + SEDAC_LOGITS_SOFTCAP + SEDAC_EMBEDDING_SCALE;
  out[threadIdx.x] = __half2float(__float2half(other));
}
extern "C" __global__ void chain_1(float* out) { chain<1>(out); }
extern "C" __global__ void chain_2(float* out) { chain<2>(out); }
extern "C" __global__ void chain_4(float* out) { chain<4>(out); }
extern "C" __global__ void chain_8(float* out) { chain<8>(out); }
extern "C" __global__ void draft(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void prepare(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_start(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void prefill_product(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void prefill_attention(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_attention(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_heads(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_add(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_head(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
extern "C" __global__ void batch_whole(char* tables, int blocks) { tables[threadIdx.x] = blocks; }
