// The residual stream. Whoever has a tile of O or of down adds it to what the residual was there, and publishes for
// each row
// - the sums, in fp32, for who has the tile next,
// - the sums times the weight of the norm that follows, as halves, which every block reads: they are the next stage's
//   input but for a factor,
// - the tile's share of the sum of squares, which gives that factor, and of what a layer's stability is computed from.
// So every block decides about exits alike, and nobody needs the residual itself. (When every block read all of the
// residual in fp32 and normalised it, the layers of Qwen2.5-0.5B's shape took 1079 us for eight rows; so, and with the
// other polls for several rows joined, 672.)
#pragma once
#include "exits.cuh"
#include "lens.cuh"
#include "shared.cuh"

// An output of a block's tiles, of O or of down: thread `tid` of a block has items tid, tid + THREADS, and so on.
template <int N>
struct TileItem {
  int row, token, index, element;
  __device__ __forceinline__ TileItem(int i, int2 tiles, int blocks)
      : row(i & 15), token(i / 16 % N), index(i / (16 * N)), element((tiles.y + index * blocks) * 16 + row) {}
};

template <int N>
struct Residual {
  const Pass& pass;
  Shared<N>& shared;
  float* scratch;

  __device__ __forceinline__ float* stream(int row, bool mlp) const {
    return scratch + row * SCRATCH_ROW + (mlp ? SCRATCH_AFTER_ATTENTION : SCRATCH_AFTER_LAYER);
  }

  // The input of QKV, or of gate and up, of the rows that ran what came before, as it arrives. A poll is a trip to L2,
  // some 0.7 us, so all is asked for at once. `compared`: whether the stability is asked for.
  __device__ __forceinline__ void receive(int tid, bool mlp, unsigned rows, unsigned parities, bool compared) {
    constexpr int EIGHTS = HIDDEN / 8, ALL = divided_up(N * EIGHTS, THREADS), AT_ONCE = ALL < 4 ? ALL : 4;
    const int2 tiles = shared.tables.tiles[mlp ? STAGE_DOWN : STAGE_O];
    const int count = N == 1 ? 1 : pass.rows, warp = tid >> 5, lane = tid & 31;
    const int items = max(count * max(EIGHTS, 32), tiles.x * 16 * N);
    const float* sums_of_row = stream(warp, mlp) + STREAM_SUMS;
#pragma unroll 1
    for (int first = tid; first - lane < items; first += AT_ONCE * THREADS) {
      Awaited<AT_ONCE> inputs;
      const float* before_at[AT_ONCE];
      float before[AT_ONCE];
      float4 sums[TILES_OF_LANE];
      const bool summing = first < THREADS && warp < count && has<N>(rows, warp);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = first + k * THREADS, row = N == 1 ? 0 : i / EIGHTS, input = N == 1 ? i : i % EIGHTS;
        inputs.set(k, i < count * EIGHTS && has<N>(rows, row),
                   static_cast<int>(stream(row, mlp) - scratch + STREAM_INPUT) * 2 + input * 8,
                   row_parity<N>(parities, row));
        const TileItem<N> item(i, tiles, pass.blocks);
        before_at[k] =
            i < tiles.x * 16 * N && has<N>(rows, item.token) ? stream(item.token, mlp) + item.element : nullptr;
      }
      unsigned stale_bits;
      do {
        inputs.ask(scratch);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          if (before_at[k]) before[k] = load1(before_at[k]);
#pragma unroll
        for (int k = 0; k < TILES_OF_LANE; k++)
          if (summing && lane + 32 * k < O_TILES) sums[k] = load4(sums_of_row + (lane + 32 * k) * SECTOR);
        stale_bits = inputs.stale_bits();
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          if (before_at[k]) stale_bits |= stale(before[k], row_parity<N>(parities, (first + k * THREADS) / 16 % N));
#pragma unroll
        for (int k = 0; k < TILES_OF_LANE; k++)
          if (summing && lane + 32 * k < O_TILES) stale_bits |= stale(sums[k], row_parity<N>(parities, warp));
      } while (stale_bits & 1);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int i = first + k * THREADS, row = N == 1 ? 0 : i / EIGHTS, input = N == 1 ? i : i % EIGHTS;
        if (inputs.at[k] >= 0) *reinterpret_cast<uint4*>(&shared.input[row][input * 8]) = halves_of(inputs.words[k]);
        const TileItem<N> item(i, tiles, pass.blocks);
        if (before_at[k]) shared.before[item.index][item.token][item.row] = unflagged(before[k]);
      }
      __syncwarp();
      if (summing) sum_up(warp, lane, sums, compared);
      __syncwarp();
    }
  }

  // What rows `starting` at `layer` start from: a row to each warp.
  __device__ __forceinline__ void start(int tid, int layer, unsigned starting) {
    const int warp = tid >> 5;
    if (warp < N && has<N>(starting, warp)) {
      // a hidden state from an exit goes on with the very bits that it would have had without
      const float before = shared.token[warp] < 0 ? saved(warp)[HIDDEN] : 0;
      const float factor = normalise(tid & 31, shared.input[warp], shared.layers[layer].attention_norm, before,
                                     ReadyPairs{[&](int d) { return pair_of_start(warp, d); }});
      if (!(tid & 31)) set_factor(warp, before ? saved(warp)[HIDDEN + 1] : factor, before ? before : factor);
    }
    const int2 o = shared.tables.tiles[STAGE_O], down = shared.tables.tiles[STAGE_DOWN];
#pragma unroll 1
    for (int i = tid; i < max(o.x, down.x) * 16 * N; i += THREADS) {
      const TileItem<N> of_o(i, o, pass.blocks), of_down(i, down, pass.blocks);
      if (!has<N>(starting, of_o.token)) continue;
      if (of_o.index < o.x) shared.before[of_o.index][of_o.token][of_o.row] = start_of(of_o.token, of_o.element);
      if (of_down.index < down.x)
        shared.layer_input[of_down.index][of_down.token][of_down.row] = start_of(of_down.token, of_down.element);
    }
  }

  // The head's input, of rows that have stopped: a row to each warp. Rows that start deeper than their sequence stopped
  // have none, and nothing to wait for.
  __device__ __forceinline__ void finish(int tid, const Exits& exits, unsigned odd) {
    const int warp = tid >> 5;
    if (warp >= N || !has<N>(pass.logits_rows, warp)) return;
    const int depth = exits.stopped_at(N == 1 ? 0 : pass.row[warp].sequence);
    const unsigned parity = row_parity<N>(layer_parities(odd, depth - 1), warp);
    if (N == 1 || pass.row[warp].first_layer < depth)
      normalise(tid & 31, shared.input[warp], pass.final_norm, 0, StreamPairs{stream(warp, false), parity});
  }

  // By the block of the row's number: its residual to where rows start from.
  __device__ __forceinline__ void save(int tid, int row, unsigned parity) const {
#pragma unroll 1
    for (int d = tid; d < HIDDEN; d += THREADS) {
      float v;
      do v = load1(stream(row, false) + d);
      while (!arrived(v, parity));
      saved(row)[d] = unflagged(v);
    }
    if (!tid) saved(row)[HIDDEN] = shared.factor_before[row], saved(row)[HIDDEN + 1] = shared.factor[row];
    __syncwarp();
  }

  // After `depth` layers: the residual of `rows` where a trained drafter takes it, a row to the block of its number.
  __device__ __forceinline__ void take_features(int tid, int depth, unsigned rows, unsigned parities) const {
    const int row = block_index();
    if (row >= N || !has<N>(rows, row)) return;
#pragma unroll 1
    for (int f = 0; f < pass.features; f++) {
      if (pass.feature_depths[f] != depth) continue;
      const SequenceRows& of = pass.sequence[N == 1 ? 0 : pass.row[row].sequence];
      const size_t position = static_cast<size_t>(of.slot) * pass.capacity + shared.position[row];
      unsigned short* to = pass.feature_states + (position * pass.features + f) * HIDDEN;
      const float* from = stream(row, false);
#pragma unroll 1
      for (int d = tid; d < HIDDEN; d += THREADS) {
        float v;
        do v = load1(from + d);
        while (!arrived(v, row_parity<N>(parities, row)));
        to[d] = __float_as_uint(unflagged(v)) + 0x8000 >> 16;
      }
      __syncwarp();
    }
  }

  // An element of O or of down, to which the residual was added; lanes l to l + 15 have a tile's of one token. `next`:
  // the weight of the norm that follows; `compared`: whether the layer's stability is asked for.
  __device__ __forceinline__ void publish(const TileItem<N>& item, float v, float next, bool mlp, unsigned parity,
                                          bool there, bool compared) {
    const float h = unflagged(v), scale = shared.factor[item.token] * (1.f / HEADROOM);
    float* to = stream(item.token, !mlp);
    float inner = 0, before = 0;
    if (mlp) {
      float& input = shared.layer_input[item.index][item.token][item.row];
      if (compared) inner = sum_of_lanes<16>(input * h), before = sum_of_lanes<16>(input * input);
      if (there) input = h;
    }
    const float squares = sum_of_lanes<16>(h * h);
    const unsigned long long word = packed_lanes(h * next * scale, item.row & 3);
    if (!there) return;
    store1(to + item.element, flagged(h, parity));
    if (!(item.row & 3)) store_halves(reinterpret_cast<half*>(to + STREAM_INPUT) + item.element, word | parity);
    if (!item.row) store4(to + STREAM_SUMS + item.element / 16 * SECTOR, squares, inner, before, parity);
  }

 private:
  // By a warp: the factor of its row's norm, and where `compared` the stability, from the tiles' sums.
  __device__ __forceinline__ void sum_up(int row, int lane, const float4 (&sums)[TILES_OF_LANE], bool compared) {
    float squares = 0, inner = 0, before = 0;
#pragma unroll
    for (int k = 0; k < TILES_OF_LANE; k++)
      if (lane + 32 * k < O_TILES)
        squares += unflagged(sums[k].x), inner += unflagged(sums[k].y), before += unflagged(sums[k].z);
    squares = sum_of_lanes<32>(squares);
    if (!lane) set_factor(row, norm_factor(squares), shared.factor[row]);
    if (!compared) return;
    inner = sum_of_lanes<32>(inner), before = sum_of_lanes<32>(before);
    if (!lane) shared.stability[row] = fmaf(inner * rsqrtf(before * squares), 0.5f, 0.5f);
  }

  __device__ __forceinline__ float* saved(int row) const {
    const SequenceRows& of = pass.sequence[pass.row[row].sequence];
    return pass.saved + (static_cast<size_t>(of.slot) * pass.capacity + shared.position[row]) * SAVED;
  }

  // Two elements of what a row starts from.
  __device__ __forceinline__ float2 pair_of_start(int row, int d) const {
    const int token = shared.token[row];
    if (token < 0) return *reinterpret_cast<const float2*>(saved(row) + d);
    const float2 v = pair_of_row(pass.embed, HIDDEN_COLUMNS, token, d);
    return make_float2(v.x * SEDAC_EMBEDDING_SCALE, v.y * SEDAC_EMBEDDING_SCALE);
  }
  __device__ __forceinline__ float start_of(int row, int d) const {
    const float2 v = pair_of_start(row, d & ~1);
    return d & 1 ? v.y : v.x;
  }

  __device__ __forceinline__ void set_factor(int row, float factor, float before) {
    shared.scale[row] = __fdividef(factor * HEADROOM, before);
    shared.factor[row] = factor, shared.factor_before[row] = before;
  }
};

// What most layers skip is called, which keeps the loop over layers short: straight code takes 1 cycle an instruction
// within 32 KB, 2 to 3 within 128 KB and 6 beyond. (Us for one, two, four
// and eight rows: SmolLM2's shape 394, 450, 501 and 530 before, 382, 439, 498 and 528 since; Qwen2.5-0.5B's 503, 581,
// 671 and 672, 508, 593, 635 and 687.)
template <int N>
__device__ __noinline__ void start_rows(const Pass& pass, Shared<N>& shared, float* scratch, int tid, int layer,
                                        unsigned starting) {
  Residual<N>{pass, shared, scratch}.start(tid, layer, starting);
}
template <int N>
__device__ __noinline__ void save_row(const Pass& pass, Shared<N>& shared, float* scratch, int tid, int row,
                                      unsigned parity) {
  Residual<N>{pass, shared, scratch}.save(tid, row, parity);
}
template <int N>
__device__ __noinline__ void take_features(const Pass& pass, Shared<N>& shared, float* scratch, int tid, int depth,
                                           unsigned rows, unsigned parities) {
  Residual<N>{pass, shared, scratch}.take_features(tid, depth, rows, parities);
}
