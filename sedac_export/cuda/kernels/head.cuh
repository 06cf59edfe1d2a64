// The head: logits of the rows that want them, the highest of each, and the winner of each sampled row's race.
#pragma once
#include "race.cuh"
#include "stages.cuh"

// The highest of some logits, and what its margin is computed from.
struct Highest {
  float logit = -INFINITE, second = -INFINITE;
  float sum = 0;  // of exp(other - logit)
  unsigned token = 0;
  bool finite = true;

  __device__ __forceinline__ void note(float other, unsigned at) {
    merge({other, -INFINITE, 1.f, at, static_cast<bool>(isfinite(other))});
  }
  __device__ __forceinline__ void merge(const Highest& other) {
    const bool theirs = other.logit > logit || (other.logit == logit && other.token < token);
    const float high = theirs ? other.logit : logit, low = theirs ? logit : other.logit;
    second = fmaxf(fmaxf(second, other.second), low);
    if (low > -INFINITE) {
      const float f = __expf(low - high);
      sum = theirs ? fmaf(sum, f, other.sum) : fmaf(other.sum, f, sum);
    } else if (theirs) {
      sum = other.sum;
    }
    if (theirs) logit = other.logit, token = other.token;
    finite = finite && other.finite;
  }
  __device__ __forceinline__ float margin() const { return (1.f - __expf(second - logit)) / sum; }

  // As four words; a token has 31 bits.
  __device__ __forceinline__ int4 words() const {
    return make_int4(__float_as_int(logit), __float_as_int(second), __float_as_int(sum),
                     static_cast<int>(token << 1 | finite));
  }
  __device__ __forceinline__ static Highest of(int4 v) {
    return {__int_as_float(v.x), __int_as_float(v.y), __int_as_float(v.z), static_cast<unsigned>(v.w) >> 1,
            static_cast<bool>(v.w & 1)};
  }
};

template <int N>
struct Head {
  const Pass& pass;
  Shared<N>& shared;
  Ring<RING_SLOTS<N>>& ring;
  const Stages<N>& stages;
  float* scratch;

  __device__ __forceinline__ void run() {
    const int tid = thread_index(), warp = tid >> 5, lane = tid & 31, t = lane & 3;
    const int tiles = head_tiles(pass);
    Highest highest[2];  // of rows 2t and 2t + 1
    Race race[2];
#pragma unroll 1
    for (int base = 0; base < tiles; base += WARPS) {
      const int4 share = head_share(warp, base, tiles, pass.blocks, shared.tables.last_head[warp]);
      const int part = share.w & 255, parts = share.w >> 8;
      float c[4] = {0, 0, 0, 0};
      multiply(share.y, share.z, c);
      const bool computes = share.z > share.y;
      if (parts > 1) {
        if (computes && part)
          for (int q = 0; q < 4; q++) shared.sums[warp][q * 32 + lane] = c[q];
        sync_block();
        if (computes && !part)
          for (int k = 1; k < parts; k++)
            for (int q = 0; q < 4; q++) c[q] += shared.sums[warp + k][q * 32 + lane];
      }
      if (computes && !part)
#pragma unroll
        for (int q = 0; q < 4; q++)
          write(2 * t + (q & 1), share.x * 16 + (lane >> 2) + (q >> 1) * 8, c[q], highest[q & 1], race[q & 1]);
      if (parts > 1) sync_block();
    }
    reduce(highest, blocks(0));
    if (pass.sampled_rows) reduce(race, blocks(1));
  }

 private:
  __device__ __forceinline__ void multiply(int first, int end, float (&c)[4]) {
    float d[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int column = first; column < end;) {
      const int count = min(PIECE, end - column);
      uint4 x[PIECE];
      stages.input(thread_index(), x, column);
      ring.multiply(count, c, d, x);
      column += count;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) c[q] += d[q];
  }

  __device__ __forceinline__ void write(int row, int token, float logit, Highest& highest, Race& race) {
    if (row >= (N == 1 ? 1 : pass.rows) || !(pass.logits_rows >> row & 1) || token >= VOCABULARY) return;
    logit *= shared.scale[row];
    if (SEDAC_LOGITS_SOFTCAP != 0.f) logit = tanhf(logit * (1.f / SEDAC_LOGITS_SOFTCAP)) * SEDAC_LOGITS_SOFTCAP;
    pass.logits[static_cast<size_t>(row) * VOCABULARY + token] = logit;
    highest.note(logit, token);
    if (pass.sampled_rows >> row & 1) race.note(logit, token, pass.race[row]);
  }

  // The block's best of each row, to `to` [row][block].
  template <class Best>
  __device__ __forceinline__ void reduce(Best (&best)[2], int4* to) {
    const int tid = thread_index(), warp = tid >> 5, lane = tid & 31;
    sync_block();
    int4* warps = reinterpret_cast<int4*>(shared.sums[0]);  // [row][warp]
#pragma unroll
    for (int i = 0; i < 2; i++) {
      for (int step = 4; step < 32; step *= 2) merge_lanes(best[i], step);
      if (lane < 4) warps[(2 * lane + i) * WARPS + warp] = best[i].words();
    }
    sync_block();
    if (tid < MAX_ROWS * WARPS) {
      Best of_row = Best::of(warps[tid]);
      for (int step = 1; step < WARPS; step *= 2) merge_lanes(of_row, step);
      if (tid % WARPS == 0) to[tid / WARPS * MAX_BLOCKS + block_index()] = of_row.words();
    }
  }

  __device__ __forceinline__ int4* blocks(int kind) const {
    return reinterpret_cast<int4*>(scratch + SCRATCH_HIGHEST) + kind * MAX_ROWS * MAX_BLOCKS;
  }

  // The best of all blocks.
  template <class Best>
  __device__ __forceinline__ Best collect(int row, const int4* from) const {
    Best best;
    for (int block = thread_index() & 31; block < pass.blocks; block += 32)
      best.merge(Best::of(__ldcg(&from[row * MAX_BLOCKS + block])));
    for (int step = 1; step < 32; step *= 2) merge_lanes(best, step);
    return best;
  }

 public:
  // By the last block: the highest of all, and who won the race; a warp to each row.
  __device__ __forceinline__ void finish() {
    const int row = thread_index() >> 5, lane = thread_index() & 31;
    if (!(pass.logits_rows >> row & 1)) return;
    const Highest highest = collect<Highest>(row, blocks(0));
    if (!lane) {
      pass.outcome->row[row].token = highest.token;
      pass.outcome->row[row].logit = highest.logit;
      pass.outcome->row[row].finite = highest.finite;
      pass.outcome->row[row].margin = highest.margin();
    }
    if (!(pass.sampled_rows >> row & 1)) return;
    const Race race = collect<Race>(row, blocks(1));
    if (lane) return;
    pass.outcome->race[row].token = race.token;
    pass.outcome->race[row].logit = race.logit;
    pass.outcome->race[row].total = highest.sum;
    pass.outcome->race[row].is_certain = race.is_certain();
  }
};
static_assert(WARPS == MAX_ROWS, "a warp finishes a row");
