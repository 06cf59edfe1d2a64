// The four matrix stages of a layer share one code path: code that runs once a layer is fetched cold, so its length is
// latency.
#pragma once
#include "combine.cuh"

template <int N>
struct Stages {
  const Pass& pass;
  Shared<N>& shared;
  Ring<RING_SLOTS<N>>& ring;
  float* scratch;

  // The block's tiles of `stage`, from the input in shared memory, or for down from the scratch. bias: of the thread's
  // first output of QKV.
  __device__ __forceinline__ void run(int tid, int stage, int layer, unsigned active, float bias) {
    const int2 tiles = shared.tables.tiles[stage];
    if (!tiles.x) return;
    float (*sums)[128] = stage == STAGE_GATE_UP ? shared.gate_up_sums : shared.sums;
    multiply(tid, stage, layer, active, sums);
    sync_block();
    if (stage == STAGE_GATE_UP) {
      activate(tid, tiles, layer, active, sums);
    } else {
      write(tid, stage, tiles, layer, active, sums, bias);
    }
  }

 private:
  __device__ __forceinline__ void multiply(int tid, int stage, int layer, unsigned active, float (*sums)[128]) {
    const int warp = tid >> 5, lane = tid & 31;
    const int2 range = shared.tables.range[stage][warp];
    float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
    constexpr int GROUP = Shared<N>::GROUP;
#pragma unroll 1
    for (int i = range.x; i < range.y; i++) {
      const Piece piece = shared.tables.piece[warp][i];
      const int in_group = (i - range.x) % GROUP;
      uint4 x[PIECE];
      if (stage == STAGE_DOWN) {
        if (!in_group) receive_activations(tid, warp, i, min(i + GROUP, range.y), layer, active);
        columns(tid, x, piece.count, &shared.activations[warp][in_group][0][0][0], 32, N * 32);
      } else {
        input(tid, x, piece.count, piece.column);
      }
      if (piece.count) ring.multiply(piece.count, c, d, x);
      if (piece.slot) {
        float* to = sums[piece.slot - 1] + lane;
#pragma unroll
        for (int q = 0; q < 4; q++) to[q * 32] = c[q] + d[q], c[q] = d[q] = 0;
      }
    }
  }

 public:
  __device__ __forceinline__ void input(int tid, uint4 (&x)[PIECE], int count, int column) const {
    columns(tid, x, count, shared.input[0] + column * 32, INPUT, 32);
  }

 private:
  // The mma's columns: a token's numbers, zeros where there is no token.
  __device__ __forceinline__ void columns(int tid, uint4 (&x)[PIECE], int count, const half* from, int row,
                                          int block) const {
    tid = fresh<N>(tid);
    const int g = tid >> 2 & 7, t = tid & 3;
    const bool token = g < (N == 1 ? 1 : pass.rows);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
      if (i < count)
        x[i] = token ? *reinterpret_cast<const uint4*>(from + g * row + i * block + t * 8) : make_uint4(0, 0, 0, 0);
  }

  // Activations of the warp's pieces `first` to `end`, as they arrive: a warp waits only for those that it multiplies,
  // and for all of a group at once.
  __device__ __forceinline__ void receive_activations(int tid, int warp, int first, int end, int layer,
                                                      unsigned active) {
    constexpr int GROUP = Shared<N>::GROUP, LOADS = divided_up(PIECE * N * 4, 32);  // of 16 bytes, to a piece
    const int lane = fresh<N>(tid) & 31;
    ulonglong2 v[GROUP][LOADS];
    const auto each = [&](auto f) {
#pragma unroll
      for (int p = 0; p < GROUP; p++)
        if (first + p < end) {
          const Piece piece = shared.tables.piece[warp][first + p];
#pragma unroll
          for (int l = 0; l < LOADS; l++) {
            const int item = lane + 32 * l, block = item / (N * 4), row = item / 4 % N, quarter = item % 4;
            if (block < piece.count && has<N>(active, row))
              f(p, l, row, (piece.column + block) * 32 + quarter * 8, (block * N + row) * 32 + quarter * 8);
          }
        }
    };
    __syncwarp();  // the group before is read
    bool all;
    do {
      all = true;
      each([&](int p, int l, int row, int from, int) {
        v[p][l] = load_halves(reinterpret_cast<const half*>(scratch + row * SCRATCH_ROW + SCRATCH_ACTIVATION) + from);
      });
      each([&](int p, int l, int row, int, int) { all &= arrived(v[p][l], row_parity(pass, row, layer)); });
      if (!all) pause();
    } while (!all);
    each([&](int p, int l, int, int, int to) {
      const ulonglong2 w = v[p][l];
      *reinterpret_cast<uint4*>(&shared.activations[warp][p][0][0][0] + to) =
          make_uint4(static_cast<unsigned>(w.x) & ~1u, static_cast<unsigned>(w.x >> 32),
                     static_cast<unsigned>(w.y) & ~1u, static_cast<unsigned>(w.y >> 32));
    });
    __syncwarp();
  }

  // An output of a tile: the sum over the warps that had a part of it, in their order.
  __device__ __forceinline__ static float gather(const float (*sums)[128], int2 parts, int row, int token) {
    const float* p = sums[parts.x] + ((row >> 3) * 2 + (token & 1)) * 32 + (row & 7) * 4 + token / 2;
    float sum = 0;
    int i = 0;
#pragma unroll 1
    for (; i + 4 <= parts.y; i += 4, p += 512) {
      const float x = p[0], y = p[128], z = p[256], u = p[384];
      sum += x, sum += y, sum += z, sum += u;
    }
#pragma unroll 1
    for (; i < parts.y; i++, p += 128) sum += *p;
    return sum;
  }

  __device__ __forceinline__ static float activation(float gate) {
    if (SEDAC_GELU) return 0.5f * gate * (1.f + tanhf(0.7978845608f * fmaf(0.044715f * gate * gate, gate, gate)));
    return __fdividef(gate, 1.f + __expf(-gate));
  }

  // act(gate) * up. Four rows make one word with one flag.
  __device__ __forceinline__ void activate(int tid, int2 tiles, int layer, unsigned active, const float (*sums)[128]) {
    tid = fresh<N>(tid);
    const int warp = tid >> 5, lane = tid & 31, all = tiles.x * 8 * N;
    const float* bias = shared.layers[layer].gate_up_bias;
#pragma unroll 1
    for (int first = warp * 32; first < all; first += THREADS) {
      const int i = min(first + lane, all - 1), row = i & 7, token = i / 8 % N, index = i / (8 * N),
                tile = tiles.y + index * pass.blocks;
      const int2 parts = shared.tables.parts[STAGE_GATE_UP][index];
      float gate = gather(sums, parts, row, token), up = gather(sums, parts, row + 8, token);
      if (bias) gate += bias[tile * 16 + row], up += bias[tile * 16 + 8 + row];
      unsigned word = __half_as_ushort(__float2half(activation(gate) * up));
      word |= __shfl_down_sync(~0u, word, 1) << 16;
      const unsigned upper = __shfl_down_sync(~0u, word, 2);
      if (!(row & 3) && has<N>(active, token) && first + lane < all) {
        half* to = reinterpret_cast<half*>(scratch + token * SCRATCH_ROW + SCRATCH_ACTIVATION) + tile * 8 + row;
        store_halves(to,
                     (static_cast<unsigned long long>(upper) << 32 | (word & ~1u)) | row_parity(pass, token, layer));
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void write(int tid, int stage, int2 tiles, int layer, unsigned active,
                                        const float (*sums)[128], float bias) {
    const Layer& weights = shared.layers[layer];
#pragma unroll 1
    for (int i = fresh<N>(tid); i < tiles.x * 16 * N; i += THREADS) {
      const int row = i & 15, token = i / 16 % N, index = i / (16 * N), tile = tiles.y + index * pass.blocks;
      if (!has<N>(active, token)) continue;
      float v = gather(sums, shared.tables.parts[stage][index], row, token);
      float* to = scratch + token * SCRATCH_ROW;
      unsigned parity = row_parity(pass, token, layer);
      if (stage == STAGE_QKV) {
        if (weights.qkv_bias) v += i < THREADS ? bias : weights.qkv_bias[tile * 16 + row];
        to += SCRATCH_QKV + tile * 16 + row;
      } else if (stage == STAGE_O) {
        if (weights.o_bias) v += weights.o_bias[tile * 16 + row];
        if (!SEDAC_POST_NORMS) v += shared.before_o[index][token][row];
        to += SCRATCH_O + tile * 16 + row;
      } else {
        const int output = tile % O_TILES * 16 + row, split = tile / O_TILES;
        if (weights.down_bias && !split) v += weights.down_bias[output];
        if (!SEDAC_POST_NORMS && !split) v += shared.before_down[index][token][row];
        to += down_offset(token, layer) + split * HIDDEN + output;
        parity = down_parity(token, layer);
      }
      store1(to, flagged(v, parity));
    }
  }

 public:
  // Down's results have two buffers: blocks without a tile of QKV may still read those of the layer before.
  __device__ __forceinline__ int down_offset(int row, int layer) const {
    return SCRATCH_DOWN + ((layer - pass.row[row].first_layer) & 1) * DOWN_SPLITS * HIDDEN;
  }
  __device__ __forceinline__ unsigned down_parity(int row, int layer) const {
    return ((layer - pass.row[row].first_layer) >> 1 & 1) ^ 1;
  }
};
