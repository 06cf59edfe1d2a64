// Exit heads: the head's rows of the model's most frequent tokens, which give the margin and the entropy of an exit's
// token, and a learned probe, which makes of these, of the normed hidden state and of the last stabilities the
// probability that the token is full depth's; see LearnedProbe in sedac_export/exits/replay/probes.py.
//
// Rows of weights go round all warps of all blocks. Every block collects what all of them found: so all decide alike
// about exits.
#pragma once
#include "race.cuh"
#include "residual.cuh"

// What margin and entropy of some logits are computed from.
struct ExitLogits {
  float highest = -INFINITE, second = -INFINITE;
  float sum = 0, weighted = 0;  // of exp(logit - highest), and of these times logit - highest

  // The same bits whichever of the two is the other.
  __device__ __forceinline__ void merge(const ExitLogits& other) {
    if (!(other.highest > -INFINITE)) return;
    if (!(highest > -INFINITE)) {
      *this = other;
      return;
    }
    const float high = fmaxf(highest, other.highest);
    second = fmaxf(fmaxf(second, other.second), fminf(highest, other.highest));
    const float ours = highest - high, theirs = other.highest - high, f = expf(ours), g = expf(theirs);
    weighted = (weighted + ours * sum) * f + (other.weighted + theirs * other.sum) * g;
    sum = sum * f + other.sum * g;
    highest = high;
  }
  __device__ __forceinline__ float4 numbers() const { return make_float4(highest, second, sum, weighted); }
  __device__ __forceinline__ static ExitLogits of(float4 v) { return {v.x, v.y, v.z, v.w}; }
};

template <int LANES>
__device__ __forceinline__ void merge_logits_of_lanes(ExitLogits& logits) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    const float4 v = logits.numbers();
    logits.merge({__shfl_xor_sync(~0u, v.x, step), __shfl_xor_sync(~0u, v.y, step), __shfl_xor_sync(~0u, v.z, step),
                  __shfl_xor_sync(~0u, v.w, step)});
  }
}

template <int N>
struct ExitHead {
  const Pass& pass;
  Shared<N>& shared;
  const Lens& lens;
  int depth;

  // What all blocks have to know of `rows`.
  __device__ __forceinline__ void publish(unsigned rows) const {
    if (lens.weights) lens.publish(rows);
#pragma unroll 1
    while (rows) {
      unsigned group = 0;
      for (int i = 0; i < Shared<N>::EXIT_ROWS && rows; i++, rows &= rows - 1) group |= rows & -rows;
      publish_group(group);
    }
  }

  // By the row's warp: its signals, to shared memory.
  __device__ __forceinline__ void collect(int row, int lane) const {
    const ExitLogits logits = logits_of_blocks(lane, row);
    const float log_sum = logf(logits.sum), first = -log_sum, second = logits.second - logits.highest - log_sum;
    const float p = expf(first), q = expf(second), minus_entropy = logits.weighted / logits.sum - log_sum;
    const float scalars[8] = {
        first, second, p, q, minus_entropy, stability(row, 2), stability(row, 1), stability(row, 0)};
    const float learned = learned_probability(lane, row, scalars);
    if (lane) return;
    float* signals = shared.exit_signals[row];
    signals[SIGNAL_MARGIN - SIGNAL_RISK] = p - q, signals[SIGNAL_LEARNED - SIGNAL_RISK] = learned;
    signals[EXIT_SIGNALS - 1] = -minus_entropy;
  }

 private:
  __device__ __forceinline__ const float* probe() const { return shared.layers[depth - 1].exit_head; }
  __device__ __forceinline__ ulonglong2* words(int row, int offset) const {
    return exit_words(lens.scratch, row, offset);
  }

  // For rows that have room beside one another: a row to each warp, then the block's weights times each row.
  __device__ __forceinline__ void publish_group(unsigned group) const {
    const int warp = thread_index() >> 5, lane = thread_index() & 31;
    const int place = __popc(group & ((1 << warp) - 1));
    const bool has_row = group >> warp & 1;
    if (has_row) normalise_exit(lens, lane, warp, pass.final_norm, shared.normed[place]);
    sync_block();
    int index = 0;
#pragma unroll 1
    for (unsigned rest = group; rest; rest &= rest - 1, index++) {
      const ExitLogits logits = multiply(lane, warp, __ffs(rest) - 1, shared.normed[index]);
      if (!lane) shared.exit_logits[index][warp] = logits.numbers();
    }
    sync_block();
    if (!has_row) return;
    ExitLogits logits = ExitLogits::of(shared.exit_logits[place][lane % WARPS]);
    merge_logits_of_lanes<WARPS>(logits);
    const float4 v = logits.numbers();
    const float of_lane = lane == 0 ? v.x : lane == 1 ? v.y : lane == 2 ? v.z : v.w;
    if (lane < 4) store_number(words(warp, EXIT_BLOCKS), 4 * block_index() + lane, lens.number, of_lane);
    __syncwarp();
  }

  // By a warp: its share of the logits of a row, and of the learned probe's first matrix, which it publishes.
  __device__ __forceinline__ ExitLogits multiply(int lane, int warp, int row, const half* x) const {
    ExitLogits logits;
    const int tokens = pass.frequent_tokens;
#pragma unroll 1
    for (int i = block_index() + pass.blocks * warp; i < tokens + LEARNED_WIDTH; i += pass.blocks * WARPS) {
      if (i < tokens) {
        float logit = product(lane, pass.frequent_rows + static_cast<size_t>(i) * HIDDEN, x);
        if (SEDAC_LOGITS_SOFTCAP != 0.f) logit = tanhf(logit * (1.f / SEDAC_LOGITS_SOFTCAP)) * SEDAC_LOGITS_SOFTCAP;
        logits.merge({logit, -INFINITE, 1.f, 0.f});
      } else {
        const float sum = product(lane, probe() + (i - tokens) * HIDDEN, x);
        if (!lane) store_number(words(row, EXIT_LEARNED), i - tokens, lens.number, sum);
      }
    }
    __syncwarp();
    return logits;
  }

  // By a warp: a row of weights times a normed state.
  template <class W>
  __device__ __forceinline__ static float product(int lane, const W* weights, const half* x) {
    float sum = 0;
#pragma unroll 4
    for (int d = 4 * lane; d < HIDDEN; d += 128) {
      const float4 w = four(weights + d), v = four(x + d);
      sum = fmaf(w.w, v.w, fmaf(w.z, v.z, fmaf(w.y, v.y, fmaf(w.x, v.x, sum))));
    }
    return sum_of_lanes<32>(sum) * HEADROOM;
  }
  __device__ __forceinline__ static float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }
  __device__ __forceinline__ static float4 four(const half* p) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    const float2 x = __half22float2(*reinterpret_cast<const half2*>(&v.x));
    const float2 y = __half22float2(*reinterpret_cast<const half2*>(&v.y));
    return make_float4(x.x, x.y, y.x, y.y);
  }

  // Of the layer that is `before` layers before this one; 0 where there is none.
  __device__ __forceinline__ float stability(int row, int before) const {
    return depth > before ? shared.stabilities[(depth - before) % 3][row] : 0;
  }

  __device__ __forceinline__ ExitLogits logits_of_blocks(int lane, int row) const {
    const ulonglong2* of_blocks = words(row, EXIT_BLOCKS);
    ExitLogits logits;
#pragma unroll 1
    for (int block = lane; block < pass.blocks; block += 32) {
      const NumberedPairs pairs{of_blocks + 2 * block, lens.number};
      ulonglong2 v, w;
      while (v = pairs.load(0), w = pairs.load(2), !pairs.here(v) || !pairs.here(w)) continue;
      const float2 first = pairs.value(v), second = pairs.value(w);
      logits.merge({first.x, first.y, second.x, second.y});
    }
    __syncwarp();
    merge_logits_of_lanes<32>(logits);
    return logits;
  }

  // After the state's matrix [width][hidden] come the scalars' [width][8] and bias [width], the last [width], and the
  // linear path's [8] and bias. A lane has two of the width.
  __device__ __forceinline__ float learned_probability(int lane, int row, const float (&scalars)[8]) const {
    const float* of_scalars = probe() + LEARNED_WIDTH * HIDDEN;
    const float *bias = of_scalars + LEARNED_WIDTH * 8, *up = bias + LEARNED_WIDTH, *linear = up + LEARNED_WIDTH;
    const NumberedPairs pairs{words(row, EXIT_LEARNED), lens.number};
    ulonglong2 v;
    while (v = pairs.load(2 * lane), !pairs.here(v)) continue;
    __syncwarp();
    const float2 of_state = pairs.value(v);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int output = 2 * lane + i;
      float inner = (i ? of_state.y : of_state.x) + bias[output];
#pragma unroll
      for (int k = 0; k < 8; k++) inner = fmaf(of_scalars[output * 8 + k], scalars[k], inner);
      sum = fmaf(inner > 0 || isnan(inner) ? inner : 0.f, up[output], sum);
    }
    float logit = sum_of_lanes<32>(sum) + linear[8];
#pragma unroll
    for (int k = 0; k < 8; k++) logit = fmaf(linear[k], scalars[k], logit);
    return 1.f / (1.f + expf(-logit));
  }
};
// What rules ask for of rows after `depth` layers, to shared memory: of `by_probe` the entropy probe's risk, of
// `by_head` what the exit head says. Apart from the kernel's own code, whose registers are scarce.
template <int N>
__device__ __noinline__ void read_exit_signals(const Pass& pass, Shared<N>& shared, float* scratch, int depth,
                                               unsigned parities, unsigned signal, unsigned stopped) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31;
  const unsigned by_probe = rows_that_ask(pass, stopped, signal == SIGNAL_RISK);
  const unsigned by_head = rows_that_ask(pass, stopped, signal >= SIGNAL_MARGIN);
  const Lens lens = lens_after(pass, shared, scratch, depth, parities);
  const ExitHead<N> head{pass, shared, lens, depth};
  if (by_head) head.publish(by_head);
  if (by_probe >> warp & 1) {
    const Probe probe{shared.layers[depth - 1].probe, scratch, pass.blocks, lens.number, parities};
    const float risk = probe.risk(warp, lane);
    if (!lane) shared.exit_signals[warp][0] = risk;
  }
  if (by_head >> warp & 1) head.collect(warp, lane);
  sync_block();
}
static_assert(LEARNED_WIDTH == 64, "a lane has two outputs");
