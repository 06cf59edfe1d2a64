// The four matrix stages of a layer share one code path: code that runs once a layer is fetched cold, so its length is
// latency.
#pragma once
#include "combine.cuh"

// What down multiplies, as it arrives: a warp waits only for the activations of its own column blocks, and for those of
// a group of them at once. The next group's are asked for before a group is multiplied.
template <int N>
struct Activations {
  const Pass& pass;
  Shared<N>& shared;
  float* scratch;
  unsigned active, parities;
  int next, end;  // column blocks of the block's tiles, one tile after another

  static constexpr int GROUP = Shared<N>::GROUP, LOADS = GROUP * N * 4 / 32;  // of 16 bytes
  Awaited<LOADS> words;

  __device__ __forceinline__ void ask(int tid) {
    const int lane = fresh<N>(tid) & 31;
    words.parities = 0;
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int item = lane + 32 * l, column = item / (N * 4), row = item / 4 % N, quarter = item % 4;
      words.set(
          l, next + column < end && has<N>(active, row),
          (row * SCRATCH_ROW + SCRATCH_ACTIVATION) * 2 + ((next + column) % INNER_COLUMNS * 4 + quarter) * SECTOR * 2,
          row_parity<N>(parities, row));
    }
    words.ask(scratch);
  }

  // The group that was asked for, to shared memory; asks for the one after it.
  __device__ __forceinline__ void receive(int tid) {
    __syncwarp();  // the group before is read
    words.wait(scratch);
    half* to = &shared.activations[tid >> 5][0][0][0] + (tid & 31) * 8;
#pragma unroll
    for (int l = 0; l < LOADS; l++)
      if (words.at[l] >= 0) *reinterpret_cast<uint4*>(to + l * 256) = halves_of(words.words[l]);
    __syncwarp();
    next += GROUP;
    if (next < end) ask(tid);
  }
};

template <int N>
struct Stages {
  const Pass& pass;
  Shared<N>& shared;
  Ring<RING_SLOTS<N>>& ring;
  Residual<N>& residual;
  float* scratch;

  // Numbers of an output: what is added to it, and the weights of the norm before the residual is added and after.
  struct OutputVectors {
    float bias, output_norm, next_norm;
  };
  // Those of the thread's first output, loaded long before they are needed.
  __device__ __forceinline__ OutputVectors first_vectors(int tid, int stage, int layer) const {
    const int2 tiles = shared.tables.tiles[stage];
    if (stage == STAGE_GATE_UP || tid >= tiles.x * 16 * N) return {0, 0, 0};
    return vectors(TileItem<N>(tid, tiles, pass.blocks).element, stage, layer);
  }

  // The block's tiles of `stage`, from the input in shared memory, or for down from the scratch. compared: whether
  // stability is asked for.
  __device__ __forceinline__ void run(int tid, int stage, int layer, unsigned active, unsigned parities,
                                      const OutputVectors& first, bool compared) {
    const int2 tiles = shared.tables.tiles[stage];
    if (!tiles.x) return;
    float (*sums)[128] = stage == STAGE_GATE_UP ? shared.gate_up_sums : shared.sums;
    multiply(tid, stage, active, parities, sums);
    sync_block();
    if (stage == STAGE_QKV) {
      write(tid, tiles, layer, active, parities, first);
    } else if (stage == STAGE_GATE_UP) {
      activate(tid, tiles, layer, active, parities);
    } else {
      if (SEDAC_POST_NORMS) normalise_outputs(tid, stage, tiles, layer, active, parities, sums, first);
      add(tid, stage, tiles, layer, active, parities, sums, first, compared);
    }
  }

 private:
  __device__ __forceinline__ OutputVectors vectors(int element, int stage, int layer) const {
    const Layer& of = shared.layers[layer];
    const float* bias = stage == STAGE_QKV ? of.qkv_bias : stage == STAGE_O ? of.o_bias : of.down_bias;
    OutputVectors v = {bias ? bias[element] : 0, 0, 0};
    if (stage == STAGE_QKV) return v;
    if (SEDAC_POST_NORMS) v.output_norm = (stage == STAGE_O ? of.attention_post_norm : of.mlp_post_norm)[element];
    v.next_norm = (stage == STAGE_O ? of.mlp_norm : shared.layers[min(layer + 1, LAYERS - 1)].attention_norm)[element];
    return v;
  }

  __device__ __forceinline__ void multiply(int tid, int stage, unsigned active, unsigned parities, float (*sums)[128]) {
    const int warp = tid >> 5, lane = tid & 31;
    const int2 range = shared.tables.range[stage][warp];
    float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
    const int columns_of_block = shared.tables.tiles[STAGE_DOWN].x * INNER_COLUMNS,
              start = share_start(warp, columns_of_block);
    Activations<N> activations{pass, shared, scratch, active, parities, start, share_start(warp + 1, columns_of_block)};
    constexpr int GROUP = Shared<N>::GROUP;
    if (stage == STAGE_DOWN) activations.ask(tid);
    int at = 0;  // column blocks of the group that are multiplied
#pragma unroll 1
    for (int i = range.x; i < range.y; i++) {
      const Piece piece = shared.tables.piece[warp][i];
      const half* from = shared.input[0] + piece.column * 32;
      int row = INPUT, block = 32;
      if (stage == STAGE_DOWN) {
        if (at % GROUP == 0) activations.receive(tid);
        from = &shared.activations[warp][at % GROUP][0][0], row = 32, block = N * 32;
        at += piece.count;
      }
      if (piece.count)
        ring.multiply(piece.count, c, d,
                      [&](uint4(&x)[BLOCKS_AT_ONCE], int first) { columns(tid, x, from + first * block, row, block); });
      if (piece.slot) {
        float* to = sums[piece.slot - 1] + lane;
#pragma unroll
        for (int q = 0; q < 4; q++) to[q * 32] = c[q] + d[q], c[q] = d[q] = 0;
      }
      ring.give_back();
    }
  }

 public:
  __device__ __forceinline__ void input(int tid, uint4 (&x)[BLOCKS_AT_ONCE], int column) const {
    columns(tid, x, shared.input[0] + column * 32, INPUT, 32);
  }

 private:
  // The mma's columns: a token's numbers, zeros where there is no token; what lies beyond a short piece is not used.
  __device__ __forceinline__ void columns(int tid, uint4 (&x)[BLOCKS_AT_ONCE], const half* from, int row,
                                          int block) const {
    tid = fresh<N>(tid);
    const int g = tid >> 2 & 7, t = tid & 3;
    const bool token = g < (N == 1 ? 1 : pass.rows);
#pragma unroll
    for (int i = 0; i < BLOCKS_AT_ONCE; i++)
      x[i] = token ? *reinterpret_cast<const uint4*>(from + g * row + i * block + t * 8) : make_uint4(0, 0, 0, 0);
  }

  // An output of a tile: the sum over the warps that had a part of it, in their order. (Four at a time in a loop:
  // SmolLM2's shape 394 us a token instead of 386.)
  __device__ __forceinline__ static float gather(const float (*sums)[128], int2 parts, int row, int token) {
    const float* p = sums[parts.x] + ((row >> 3) * 2 + (token & 1)) * 32 + (row & 7) * 4 + token / 2;
    float part[WARPS], sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) part[i] = i < parts.y ? p[i * 128] : 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += part[i];
    return sum;
  }

  // act(gate) * up. Four rows make one word with one flag.
  __device__ __forceinline__ void activate(int tid, int2 tiles, int layer, unsigned active, unsigned parities) {
    tid = fresh<N>(tid);
    const int warp = tid >> 5, lane = tid & 31, all = tiles.x * 8 * N;
    const float* bias = shared.layers[layer].gate_up_bias;
#pragma unroll 1
    for (int first = warp * 32; first < all; first += THREADS) {
      const int i = min(first + lane, all - 1), row = i & 7, token = i / 8 % N, index = i / (8 * N),
                tile = tiles.y + index * pass.blocks;
      const int2 parts = shared.tables.parts[STAGE_GATE_UP][index];
      const float scale = shared.scale[token];
      float gate = gather(shared.gate_up_sums, parts, row, token) * scale,
            up = gather(shared.gate_up_sums, parts, row + 8, token) * scale;
      if (bias) gate += bias[tile * 16 + row], up += bias[tile * 16 + 8 + row];
      const unsigned long long word = packed_lanes(activation(gate) * up, row & 3);
      float* to = scratch + token * SCRATCH_ROW + SCRATCH_ACTIVATION + tile * SECTOR;
      if (!(row & 3) && has<N>(active, token) && first + lane < all)
        store_halves(reinterpret_cast<half*>(to) + row, word | row_parity<N>(parities, token));
      __syncwarp();
    }
  }

  // Queries, keys and values.
  __device__ __forceinline__ void write(int tid, int2 tiles, int layer, unsigned active, unsigned parities,
                                        const OutputVectors& first) {
#pragma unroll 1
    for (int i = fresh<N>(tid); i < tiles.x * 16 * N; i += THREADS) {
      const TileItem<N> item(i, tiles, pass.blocks);
      if (!has<N>(active, item.token)) continue;
      const float bias = i < THREADS ? first.bias : vectors(item.element, STAGE_QKV, layer).bias;
      const float v = gather(shared.sums, shared.tables.parts[STAGE_QKV][item.index], item.row, item.token);
      store1(scratch + item.token * SCRATCH_ROW + SCRATCH_QKV + item.element,
             flagged(fmaf(v, shared.scale[item.token], bias), row_parity<N>(parities, item.token)));
    }
  }

  // f(item, its vectors, whether it is one) for the thread's outputs of O or of down; by whole warps.
  template <class F>
  __device__ __forceinline__ void each_output(int tid, int stage, int2 tiles, int layer, const OutputVectors& first,
                                              F f) {
    tid = fresh<N>(tid);
    const int all = tiles.x * 16 * N;
#pragma unroll 1
    for (int base = tid & ~31; base < all; base += THREADS) {
      const int i = base + (tid & 31);
      const TileItem<N> item(min(i, all - 1), tiles, pass.blocks);
      f(item, base < THREADS ? first : vectors(item.element, stage, layer), i < all);
    }
  }

  // Outputs with the residual added.
  __device__ __forceinline__ void add(int tid, int stage, int2 tiles, int layer, unsigned active, unsigned parities,
                                      const float (*sums)[128], const OutputVectors& first, bool compared) {
    each_output(tid, stage, tiles, layer, first, [&](const TileItem<N>& item, const OutputVectors& of, bool there) {
      float v;
      if (SEDAC_POST_NORMS) {
        v = shared.output[item.index][item.token][item.row] * shared.output_factor[item.token] * of.output_norm;
      } else {
        v = gather(sums, shared.tables.parts[stage][item.index], item.row, item.token) + of.bias;
      }
      residual.publish(item, v + shared.before[item.index][item.token][item.row], of.next_norm, stage == STAGE_DOWN,
                       row_parity<N>(parities, item.token), there && has<N>(active, item.token), compared);
    });
    __syncwarp();
  }

  // Where a norm comes before adding: those who have tiles exchange its sums of squares.
  __device__ __forceinline__ void normalise_outputs(int tid, int stage, int2 tiles, int layer, unsigned active,
                                                    unsigned parities, const float (*sums)[128],
                                                    const OutputVectors& first) {
    const auto squares = [&](int row) { return residual.stream(row, stage == STAGE_O) + STREAM_OUTPUT_SUMS; };
    each_output(tid, stage, tiles, layer, first, [&](const TileItem<N>& item, const OutputVectors& of, bool there) {
      const float v = gather(sums, shared.tables.parts[stage][item.index], item.row, item.token) + of.bias;
      const float sum = sum_of_lanes<16>(v * v);
      if (!there) return;
      shared.output[item.index][item.token][item.row] = v;
      if (!item.row && has<N>(active, item.token))
        store1(squares(item.token) + item.element / 16 * SECTOR, flagged(sum, row_parity<N>(parities, item.token)));
    });
    __syncwarp();
    const int warp = tid >> 5, lane = tid & 31;
    if (warp < N && has<N>(active, warp)) {
      float sum = 0;
#pragma unroll 1
      for (int tile = lane; tile < O_TILES; tile += 32) {
        float v;
        do v = load1(squares(warp) + tile * SECTOR);
        while (!arrived(v, row_parity<N>(parities, warp)));
        sum += unflagged(v);
      }
      __syncwarp();
      sum = sum_of_lanes<32>(sum);
      if (!lane) shared.output_factor[warp] = norm_factor(sum);
    }
    sync_block();
  }
};
