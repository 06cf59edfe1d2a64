// A block of a packed matrix: 16 rows by 32 columns, in the order of the mma's lanes, so that reads of it have no bank
// conflicts. Lane l has row l / 4 of the upper eight rows and of the lower eight, and of both columns 8 (l % 4) to
// 8 (l % 4) + 7: the mma's order of columns is another, for weights and input alike.
//
// Given at compile time: SEDAC_WEIGHT_BITS (16 for fp16, 8, or 4), and SEDAC_ZERO_POINTS, whether quantized weights
// have zero points; without them the middle of the range stands for zero. Quantized blocks are a weight's numbers, a
// scale (fp16) for each row, and a zero point for each row.
//
// Quantized weights become halves less their zero, which are exact, and the sums of a block are scaled in fp32: four
// multiplications a lane instead of sixteen, and no rounding of weights.
#pragma once
#include "copies.cuh"

constexpr int WEIGHT_BITS = SEDAC_WEIGHT_BITS;
constexpr bool QUANTIZED = WEIGHT_BITS < 16, ZERO_POINTS = SEDAC_ZERO_POINTS;
constexpr int LANE_BYTES = 2 * WEIGHT_BITS, NUMBER_BYTES = 32 * LANE_BYTES;  // LANE_BYTES: of two rows' eight columns
constexpr int SCALE_BYTES = QUANTIZED ? 32 : 0, ZERO_POINT_BYTES = QUANTIZED && ZERO_POINTS ? 16 : 0;
constexpr int BLOCK_BYTES = NUMBER_BYTES + SCALE_BYTES + ZERO_POINT_BYTES;

// Column blocks that are sent at once, and those of them that a lane holds. Eight are sent of 4 bits, 2 KB (smaller
// pieces were not tried; held all at once they spilled 156 and 196 bytes of SmolLM2's shape with four rows and eight),
// and of fp16 where a warp's share of a stage is one piece then. (Us for one, two and four rows: SmolLM2's shape 381,
// 436 and 491 in pieces of four, 376, 421 and 479 in pieces of eight, which eight rows spill 164 bytes for instead of
// 44; Qwen2.5-0.5B's, where shares are up to 19, 508,
// 583 and 630, and 523, 587 and 643.)
constexpr int BLOCKS_AT_ONCE = REGISTERS_MOVE ? 4 : 2;
constexpr bool ONE_PIECE = !QUANTIZED && REGISTERS_MOVE && LARGEST_SHARE <= 2 * BLOCKS_AT_ONCE;
constexpr int PIECE = BLOCKS_AT_ONCE * (WEIGHT_BITS == 4 || ONE_PIECE ? 2 : 1);

// Halves of 1024 and more have steps of 1: a number in their low bits is added to 1024.
constexpr unsigned HALVES_1024 = 0x64006400;

__device__ __forceinline__ half2 as_half2(unsigned v) { return *reinterpret_cast<const half2*>(&v); }
__device__ __forceinline__ unsigned as_word(half2 v) { return *reinterpret_cast<const unsigned*>(&v); }
template <unsigned MASK>
__device__ __forceinline__ half2 above_1024(unsigned v) {
  unsigned r;
  asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(r) : "r"(v), "n"(MASK), "n"(HALVES_1024));  // v & MASK | HALVES_1024
  return as_half2(r);
}

// Eight numbers of a row as halves less `zero`, which is 1024 more. Of 4 bits, the even ones are the lower half word's,
// and the odd ones the upper one's.
__device__ __forceinline__ uint4 halves_less(unsigned v, half2 zero) {
  const half2 sixteenth = __float2half2_rn(1.f / 16), zero_of_high = __hsub2(__float2half2_rn(960.f), zero);
  const unsigned w = v >> 8;
  return make_uint4(as_word(__hsub2(above_1024<0x000f000f>(v), zero)),
                    as_word(__hfma2(above_1024<0x00f000f0>(v), sixteenth, zero_of_high)),
                    as_word(__hsub2(above_1024<0x000f000f>(w), zero)),
                    as_word(__hfma2(above_1024<0x00f000f0>(w), sixteenth, zero_of_high)));
}
__device__ __forceinline__ uint4 halves_less(uint2 v, half2 zero) {
  const auto pair = [&](unsigned of, unsigned bytes) {
    return as_word(__hsub2(as_half2(__byte_perm(of, HALVES_1024, bytes)), zero));
  };
  return make_uint4(pair(v.x, 0x5150), pair(v.x, 0x5352), pair(v.y, 0x5150), pair(v.y, 0x5352));
}

__device__ __forceinline__ void multiply_block(float (&c)[4], float (&d)[4], uint4 upper, uint4 lower, uint4 x) {
  mma(c, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
  mma(d, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
}

// What a lane reads of a block, from shared memory or from the matrix itself.
__device__ __forceinline__ uint4 load_16(unsigned at) { return load_shared(at); }
__device__ __forceinline__ uint2 load_8(unsigned at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ unsigned load_4(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ unsigned load_2(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u16 %0,[%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_16(const char* at) { return __ldg(reinterpret_cast<const uint4*>(at)); }
__device__ __forceinline__ uint2 load_8(const char* at) { return __ldg(reinterpret_cast<const uint2*>(at)); }
__device__ __forceinline__ unsigned load_4(const char* at) { return __ldg(reinterpret_cast<const unsigned*>(at)); }
__device__ __forceinline__ unsigned load_2(const char* at) {
  return __ldg(reinterpret_cast<const unsigned short*>(at));
}

// Addresses of what a lane reads of the first of some blocks.
template <class At>
struct LanePlace {
  At numbers, scales, zeros;

  LanePlace() = default;
  __device__ __forceinline__ LanePlace(At blocks, int lane)
      : numbers(blocks + lane * (QUANTIZED ? LANE_BYTES : LANE_BYTES / 2)),
        scales(blocks + NUMBER_BYTES + (lane >> 2) * 4),
        zeros(blocks + NUMBER_BYTES + SCALE_BYTES + (lane >> 2) * 2) {}
};

// A lane's part of a block.
template <int BITS>
struct LaneWeights {
  uint2 numbers;  // the upper row's, and the lower one's; of 8 bits, each of four columns, then of the other four
  uint2 others;
  unsigned scales, zeros;

  // Of the block `offset` bytes after the first.
  template <class At>
  __device__ __forceinline__ void load(const LanePlace<At>& first, unsigned offset) {
    if constexpr (BITS == 8) {
      const uint4 v = load_16(first.numbers + offset);
      numbers = make_uint2(v.x, v.y), others = make_uint2(v.z, v.w);
    } else {
      numbers = load_8(first.numbers + offset);
    }
    scales = load_4(first.scales + offset);
    if constexpr (ZERO_POINTS) zeros = load_2(first.zeros + offset);
  }

  // Its product with `x`, added to `c` where it is `wanted`. Only the addition depends on that: with a branch around
  // all of it, the products of a piece's blocks waited for one another (Mistral-7B's shape in 4 bits, us a token: 2609,
  // and 3561 for eight rows, instead of 2515 and 3317).
  __device__ __forceinline__ void multiply(float (&c)[4], float (&)[4], uint4 x, bool wanted) const {
    constexpr unsigned MIDDLE = HALVES_1024 | (1 << (BITS - 1)) * 0x10001;
    const half2 upper_zero = as_half2(ZERO_POINTS ? __byte_perm(zeros, HALVES_1024, 0x5050) : MIDDLE);
    const half2 lower_zero = as_half2(ZERO_POINTS ? __byte_perm(zeros, HALVES_1024, 0x5151) : MIDDLE);
    float sum[4] = {0, 0, 0, 0};
    if constexpr (BITS == 8)
      multiply_block(sum, sum, halves_less(numbers, upper_zero), halves_less(others, lower_zero), x);
    else
      multiply_block(sum, sum, halves_less(numbers.x, upper_zero), halves_less(numbers.y, lower_zero), x);
    const float2 scale = __half22float2(as_half2(scales));
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float added = fmaf(q < 2 ? scale.x : scale.y, sum[q], c[q]);
      c[q] = wanted ? added : c[q];
    }
  }
};
template <>
struct LaneWeights<16> {
  uint4 upper, lower;

  template <class At>
  __device__ __forceinline__ void load(const LanePlace<At>& first, unsigned offset) {
    const At at = first.numbers + offset;
    upper = load_16(at), lower = load_16(at + NUMBER_BYTES / 2);
  }
  __device__ __forceinline__ void multiply(float (&c)[4], float (&d)[4], uint4 x, bool wanted) const {
    if (wanted) multiply_block(c, d, upper, lower, x);
  }
};

// Columns d and d + 1 of a row of a packed matrix, d even.
__device__ __forceinline__ float2 pair_of_row(const char* matrix, int column_blocks, int row, int d) {
  const char* block = matrix + (static_cast<size_t>(row / 16) * column_blocks + d / 32) * BLOCK_BYTES;
  const int lower = row % 16 / 8, lane = row % 8 * 4 + d % 32 / 8, pair = d % 8 / 2;
  if constexpr (!QUANTIZED)
    return __half22float2(reinterpret_cast<const half2*>(block + lower * (NUMBER_BYTES / 2) + lane * 16)[pair]);
  const int of_rows = row % 8 * 2 + lower;
  const char* numbers = block + lane * LANE_BYTES + lower * (LANE_BYTES / 2);
  const float scale = __half2float(reinterpret_cast<const half*>(block + NUMBER_BYTES)[of_rows]);
  const unsigned char* zeros = reinterpret_cast<const unsigned char*>(block + NUMBER_BYTES + SCALE_BYTES);
  const int zero = ZERO_POINTS ? zeros[of_rows] : 1 << (WEIGHT_BITS - 1);
  int first, second;
  if constexpr (WEIGHT_BITS == 8) {
    const uchar2 v = reinterpret_cast<const uchar2*>(numbers)[pair];
    first = v.x, second = v.y;
  } else {
    const unsigned v = *reinterpret_cast<const unsigned*>(numbers) >> pair * 4;
    first = v & 15, second = v >> 16 & 15;
  }
  return make_float2(static_cast<float>(first - zero) * scale, static_cast<float>(second - zero) * scale);
}
