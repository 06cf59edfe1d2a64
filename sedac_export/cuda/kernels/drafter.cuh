// A trained drafter: one decoder layer that continues the model's hidden states, see sedac_export/drafter. One launch
// takes in the positions that were verified since the last one, and drafts from the newest of them as far as the core
// says that the next token is worth it; for several sequences at once, each by blocks of its own. Such a small layer
// waits for barriers more than for weights, so that a share of the blocks drafts nearly as fast as all.
//
// Of the positions that are taken in, all but the newest only leave keys and values, so that every stage after these
// has one row. Where the model chose the tokens, they are known; from there on each is the one that was drafted.
#pragma once
#include "draft_attention.cuh"
#include "draft_choice.cuh"

struct Drafter {
  const DraftPass& pass;
  DraftShared& shared;
  const int index, block;  // of the sequence, and among its blocks
  const DraftSequence& of;
  DraftScratch scratch;
  GridBarrier barrier;
  int rows;  // that are taken in
  int token, step = 0;
  float accepted = 1;

  __device__ __forceinline__ explicit Drafter(const DraftPass& pass, DraftShared& shared)
      : pass(pass),
        shared(shared),
        index(blockIdx.x / pass.blocks),
        block(blockIdx.x % pass.blocks),
        of(pass.sequence[index]),
        scratch(pass.scratch, index),
        barrier(scratch.arrived(pass.sequences), pass.blocks) {}

  __device__ __forceinline__ void run() {
    if (!find_rows()) return;
    int row = rows - 1;  // whose state is the newest
    if (rows == 1)
      take_in<1>();
    else
      take_in<DRAFT_ROWS>();
    if (!of.steps) return;
    int position = of.start + row;
#pragma unroll 1
    for (;;) {
      DraftAttention{pass, scratch, shared, of.slot, block}.run(position);
      wait();
      add_attention(row, position);
      wait();
      activate();
      wait();
      finish_layer();
      wait();
      choose();
      wait();
      if (!goes_on()) return;
      row = 0, position++;
      join<1>(1, [&](int) { return token; });
      wait();
      queries_keys_values<1>(1, position);
      wait();
    }
  }

 private:
  __device__ __forceinline__ void wait() { barrier.wait(pass.blocks); }

  // f(i) for the block's share of `count` things, a warp for each.
  template <class F>
  __device__ __forceinline__ void each(int count, F f) const {
#pragma unroll 1
    for (int i = block + pass.blocks * (threadIdx.x >> 5); i < count; i += pass.blocks * DRAFT_WARPS) f(i);
  }
  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }

  // How many positions are taken in, and what followed them. Whether all of that is known.
  __device__ __forceinline__ bool find_rows() {
    const int lane = this->lane();
    const bool verifies = of.verifying_row >= 0, has = lane < of.rows;
    int followed = has ? of.token[lane] : 0;
    rows = of.rows;
    if (verifies) {
      const int chosen = has ? __ldcg(pass.chosen + of.verifying_row + lane) : 0;
      const bool accepted = lane < rows - 1 && chosen == followed;
      rows = __ffs(static_cast<int>(~__ballot_sync(~0u, accepted)));
      followed = chosen;
    }
    const bool known = __all_sync(~0u, lane >= rows || followed >= 0);
    if (threadIdx.x < MAX_ROWS) shared.followed[lane] = followed;
    if (!block && threadIdx.x == rows - 1) {
      DraftOutcome& outcome = pass.outcome[index];
      outcome.started = outcome.ended = now();
      outcome.tokens = 0, outcome.rows = rows, outcome.followed = followed;
    }
    return known;
  }

  // Verified positions: their hidden states become states, then keys and values.
  template <int ROWS>
  __device__ __forceinline__ void take_in() {
    combine<ROWS>();
    wait();
    join<ROWS>(rows, [&](int row) { return shared.followed[row]; });
    wait();
    queries_keys_values<ROWS>(rows, of.start);
    wait();
  }

  template <int ROWS>
  __device__ __forceinline__ void combine() const {
    const int features = pass.features_of_position, width = features * HIDDEN;
    const size_t first = static_cast<size_t>(of.slot) * pass.capacity + of.start;
    // several rows take too many registers for all to be asked for at once
    constexpr int AT_ONCE = ROWS == 1 ? MAX_FEATURES : 1;
#pragma unroll 1
    for (int begin = 0; begin < features; begin += AT_ONCE) {
      Normed<ROWS> normed[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int f = begin + k;
        if (f >= features) break;
        normed[k].ask(rows, pass.feature_norms + f * HIDDEN, [&](int row, int d) {
          const unsigned short* from = pass.features + (first + row) * width + f * HIDDEN;
          return __uint_as_float(static_cast<unsigned>(from[d]) << 16);
        });
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (begin + k < features) normed[k].finish(shared, (begin + k) * HIDDEN, width, pass.norm_epsilon);
    }
    each(HIDDEN, [&](int d) {
      float sums[1][ROWS];
      multiply_rows<ROWS, 1, MAX_FEATURES * HIDDEN>(sums, pass.combine + static_cast<size_t>(d) * width, 0,
                                                    shared.input, width, width);
      for_rows<ROWS>(rows, [&](int row) { scratch.state(row)[d] = sums[0][row]; });
    });
  }

  // The state and the embedding of the token that follows: the layer's input.
  template <int ROWS, class Token>
  __device__ __forceinline__ void join(int rows, Token token_of) const {
    // both at once where registers allow
    Normed<ROWS> state, token;
    state.ask(rows, pass.state_norm, [&](int row, int d) { return load_result(scratch.state(row) + d); });
    if (ROWS > 1) state.finish(shared, 0, 2 * HIDDEN, pass.norm_epsilon);
    token.ask(rows, pass.embedding_norm, [&](int row, int d) { return embedding(token_of(row), d); });
    if (ROWS == 1) state.finish(shared, 0, 2 * HIDDEN, pass.norm_epsilon);
    token.finish(shared, HIDDEN, 2 * HIDDEN, pass.norm_epsilon);
    each(HIDDEN, [&](int d) {
      const float residual = lane() < rows ? load_result(scratch.state(lane()) + d) : 0.f;
      float sums[1][ROWS];
      multiply_rows<ROWS, 1, 2 * HIDDEN>(sums, pass.join + static_cast<size_t>(d) * 2 * HIDDEN, 0, shared.input,
                                         2 * HIDDEN);
      for_rows<ROWS>(rows, [&](int row) { scratch.layer_input(row)[d] = residual + sums[0][row]; });
    });
  }
  __device__ __forceinline__ float embedding(int token, int d) const {
    const float2 v = pair_of_row(pass.embed, HIDDEN_COLUMNS, token, d & ~1);
    return (d & 1 ? v.y : v.x) * SEDAC_EMBEDDING_SCALE;
  }

  // A warp has two elements of a head that rotate into each other.
  template <int ROWS>
  __device__ __forceinline__ void queries_keys_values(int rows, int start) const {
    constexpr int HALF = HEAD / 2;
    Normed<ROWS> normed;
    normed.ask(rows, pass.attention_norm, [&](int row, int d) { return load_result(scratch.layer_input(row) + d); });
    normed.finish(shared, 0, HIDDEN, pass.norm_epsilon);
    each(QKV / 2, [&](int i) {
      const int head = i / HALF, low = i % HALF;
      float sums[2][ROWS];
      multiply_rows<ROWS, 2, HIDDEN>(sums, pass.qkv + (static_cast<size_t>(head) * HEAD + low) * HIDDEN, HALF * HIDDEN,
                                     shared.input, HIDDEN);
      for_rows<ROWS>(rows,
                     [&](int row) { place(head, low, start + row, row == rows - 1, sums[0][row], sums[1][row]); });
    });
  }
  __device__ __forceinline__ void place(int head, int low, int position, bool newest, float u, float v) const {
    const bool value = head >= HEADS + KV_HEADS;
    if (!value) {
      float sine, cosine;
      sincosf(static_cast<float>(position) * pass.frequencies[low], &sine, &cosine);
      const float x = u, y = v;
      u = x * cosine - y * sine, v = y * cosine + x * sine;
    }
    if (head < HEADS) {
      float* to = scratch.query() + head * HEAD + low;
      if (newest) to[0] = u, to[HEAD / 2] = v;
      return;
    }
    const int kv_head = head - HEADS - (value ? KV_HEADS : 0);
    half* to = (value ? pass.values : pass.keys) +
               ((static_cast<size_t>(of.slot) * KV_HEADS + kv_head) * pass.capacity + position) * HEAD + low;
    to[0] = bounded_half(u), to[HEAD / 2] = bounded_half(v);
  }

  __device__ __forceinline__ void add_attention(int row, int position) const {
    DraftAttention{pass, scratch, shared, of.slot, block}.combine(position);
    each(HIDDEN, [&](int d) {
      const float residual = load_result(scratch.layer_input(row) + d);
      float sums[1][1];
      multiply_rows<1, 1, ATTENTION>(sums, pass.o + static_cast<size_t>(d) * ATTENTION, 0, shared.input, 0);
      if (!lane()) scratch.after_attention()[d] = residual + sums[0][0];
    });
  }

  __device__ __forceinline__ void activate() const {
    Normed<1> normed;
    normed.ask(1, pass.mlp_norm, [&](int, int d) { return load_result(scratch.after_attention() + d); });
    normed.finish(shared, 0, 0, pass.norm_epsilon);
    each(INNER, [&](int i) {
      float sums[2][1];
      multiply_rows<1, 2, HIDDEN>(sums, pass.gate_up + static_cast<size_t>(i) * HIDDEN,
                                  static_cast<size_t>(INNER) * HIDDEN, shared.input, 0);
      const float gate = sums[0][0];
      if (!lane()) scratch.activation()[i] = bounded_half(__fdividef(gate, 1.f + __expf(-gate)) * sums[1][0]);
    });
  }

  // The next state.
  __device__ __forceinline__ void finish_layer() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < INNER / 8; i += DRAFT_THREADS)
      reinterpret_cast<uint4*>(shared.input)[i] = __ldcg(reinterpret_cast<const uint4*>(scratch.activation()) + i);
    __syncthreads();
    each(HIDDEN, [&](int d) {
      const float residual = load_result(scratch.after_attention() + d);
      float sums[1][1];
      multiply_rows<1, 1, INNER>(sums, pass.down + static_cast<size_t>(d) * INNER, 0, shared.input, 0);
      if (!lane()) scratch.state(0)[d] = residual + sums[0][0];
    });
  }

  // Each block's best token, of the draft vocabulary.
  __device__ __forceinline__ void choose() const {
    constexpr int AT_ONCE = 4;  // rows of the head
    Normed<1> normed;
    normed.ask(1, pass.norm, [&](int, int d) { return load_result(scratch.state(0) + d); });
    normed.finish(shared, 0, 0, pass.norm_epsilon);
    Highest highest;
    Race race;
    const RowRace& by = of.race[(of.verifying_row < 0 ? 0 : rows - 1) + step];
    each(divided_up(pass.draft_tokens, AT_ONCE), [&](int i) {
      // the last few are taken again where there are not as many more
      const int first = max(0, min(i * AT_ONCE, pass.draft_tokens - AT_ONCE));
      int tokens[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) tokens[k] = pass.tokens[first + k];
      float sums[AT_ONCE][1];
      multiply_rows<1, AT_ONCE, HIDDEN>(sums, pass.head + static_cast<size_t>(first) * HIDDEN, HIDDEN, shared.input, 0);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        if (first + k < i * AT_ONCE) continue;
        highest.note(sums[k][0], tokens[k]);
        if (of.sampled) race.note(sums[k][0], tokens[k], by);
      }
    });
    const int warp = threadIdx.x >> 5, lane = this->lane();
    if (!lane) shared.bests[0][warp] = highest.words(), shared.bests[1][warp] = race.words();
    __syncthreads();
    if (!warp) __stcg(scratch.best(0, block), best_of_warps<Highest>(0).words());
    if (warp == 1) __stcg(scratch.best(1, block), best_of_warps<Race>(1).words());
  }
  template <class Best>
  __device__ __forceinline__ Best best_of_warps(int kind) const {
    return best_of_lanes(lane() < DRAFT_WARPS ? Best::of(shared.bests[kind][lane()]) : Best{});
  }
  // What each warp finds of 32 blocks, for best_of_warps.
  template <class Best>
  __device__ __forceinline__ void find_best_of_blocks(int kind) const {
    const Best of_warp =
        best_of_lanes(threadIdx.x < pass.blocks ? Best::of(__ldcg(scratch.best(kind, threadIdx.x))) : Best{});
    if (!lane()) shared.bests[kind][threadIdx.x >> 5] = of_warp.words();
  }
  static_assert(MAX_BLOCKS <= DRAFT_THREADS, "a thread for each block");

  // Notes the token that all blocks find to be the best. Whether it is to be followed by another one.
  __device__ __forceinline__ bool goes_on() {
    find_best_of_blocks<Highest>(0);
    if (of.sampled) find_best_of_blocks<Race>(1);
    __syncthreads();
    const Highest highest = best_of_warps<Highest>(0);
    const Race race = of.sampled ? best_of_warps<Race>(1) : Race{};
    const float logit = of.sampled ? race.logit : highest.logit;
    token = static_cast<int>(of.sampled ? race.token : highest.token);
    const float probability = __expf(logit - highest.logit) / highest.sum;
    if (!block && !threadIdx.x) {
      DraftOutcome& outcome = pass.outcome[index];
      outcome.token[step] = token, outcome.probability[step] = probability;
      outcome.tokens = step + 1, outcome.ended = now();
    }
    const int bin = max(0, min(static_cast<int>(probability * MARGIN_BINS), MARGIN_BINS - 1));
    accepted *= of.acceptance[bin];
    const bool again = highest.finite && accepted >= of.min_accepted[step] && step + 1 < of.steps;
    step++;
    return again;
  }

  // f(row), by the lane of that number.
  template <int ROWS, class F>
  __device__ __forceinline__ static void for_rows(int rows, F f) {
#pragma unroll
    for (int row = 0; row < ROWS; row++)
      if (row < rows && lane() == row) f(row);
  }
};

extern "C" __global__ void __launch_bounds__(DRAFT_THREADS, 1) draft(const __grid_constant__ DraftPass pass) {
  extern __shared__ __align__(128) unsigned char memory[];
  Drafter(pass, *reinterpret_cast<DraftShared*>(memory)).run();
}
