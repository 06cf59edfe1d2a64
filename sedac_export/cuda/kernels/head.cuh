// The head: logits of the rows that want them, the highest of each, and the winner of each sampled row's race.
//
// Every block publishes its best of each row, and block 0 collects them for the host. Where another step may follow,
// every block does: so all know the next token, and nobody waits for the host.
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

// What the next launch is told of a row.
__device__ __forceinline__ int chosen_token(const Highest& highest, const Race& race, bool sampled) {
  return !highest.finite ? -1 : static_cast<int>(sampled ? race.token : highest.token);
}

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
    reduce(highest, 0);
    if (pass.sampled_rows) reduce(race, 1);
  }

  // By a warp: what all blocks found for its row, to the outcome by `writes`; then whether the row takes another step.
  // Whole warps call it.
  __device__ __forceinline__ void collect(bool writes) {
    const int row = thread_index() >> 5, lane = thread_index() & 31;
    if (!(pass.logits_rows >> row & 1)) return;
    const bool sampled = pass.sampled_rows >> row & 1;
    const Highest highest = best_of_blocks<Highest>(row, 0);
    const Race race = sampled ? best_of_blocks<Race>(row, 1) : Race{};
    __syncwarp();
    if (lane) return;
    if (writes) {
      const int at = shared.step * pass.rows + row;
      write_outcome(at, highest, race, sampled);
      pass.chosen[at] = chosen_token(highest, race, sampled);
    }
    if (shared.step + 1 < pass.steps) go_on(row, highest, sampled ? race.token : highest.token);
  }

 private:
  __device__ __forceinline__ void multiply(int first, int end, float (&c)[4]) {
    float d[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int column = first; column < end;) {
      const int count = min(PIECE, end - column);
      ring.multiply(count, c, d,
                    [&](uint4(&x)[BLOCKS_AT_ONCE], int first) { stages.input(thread_index(), x, column + first); });
      ring.give_back();
      column += count;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) c[q] += d[q];
  }

  __device__ __forceinline__ void write(int row, int token, float logit, Highest& highest, Race& race) {
    if (row >= (N == 1 ? 1 : pass.rows) || !(pass.logits_rows >> row & 1) || token >= VOCABULARY) return;
    logit *= shared.scale[row];
    if (SEDAC_LOGITS_SOFTCAP != 0.f) logit = tanhf(logit * (1.f / SEDAC_LOGITS_SOFTCAP)) * SEDAC_LOGITS_SOFTCAP;
    pass.logits[static_cast<size_t>(of_step(row)) * VOCABULARY + token] = logit;
    highest.note(logit, token);
    if (pass.sampled_rows >> row & 1) race.note(logit, token, pass.race[of_step(row)]);
  }

  __device__ __forceinline__ int of_step(int row) const { return shared.step * (N == 1 ? 1 : pass.rows) + row; }

  // Publishes the block's best of each row.
  template <class Best>
  __device__ __forceinline__ void reduce(Best (&best)[2], int kind) {
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
      // the block's keys and values are there for who reads this, and goes on
      if (tid % WARPS == 0) {
        __threadfence();
        publish(tid / WARPS, kind, of_row.words());
      }
    }
    __syncwarp();
  }

  // A block's four words about a row, each beside the number of the step.
  __device__ __forceinline__ ulonglong2* words(int row, int kind, int block) const {
    return reinterpret_cast<ulonglong2*>(scratch + SCRATCH_HIGHEST) +
           ((kind * MAX_ROWS + row) * MAX_BLOCKS + block) * 2;
  }
  __device__ __forceinline__ void publish(int row, int kind, int4 v) const {
    const unsigned long long number = static_cast<unsigned long long>(pass.number + shared.step) << 32;
    ulonglong2* to = words(row, kind, block_index());
    store_words(to, number | static_cast<unsigned>(v.x), number | static_cast<unsigned>(v.y));
    store_words(to + 1, number | static_cast<unsigned>(v.z), number | static_cast<unsigned>(v.w));
  }

  // The best of all blocks, in the same order wherever it is computed.
  template <class Best>
  __device__ __forceinline__ Best best_of_blocks(int row, int kind) const {
    constexpr int AT_ONCE = 2;
    const unsigned number = pass.number + shared.step;
    Best best;
#pragma unroll 1
    for (int first = thread_index() & 31; first < pass.blocks; first += AT_ONCE * 32) {
      ulonglong2 v[AT_ONCE][2];
      bool all;
      do {
        all = true;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          if (first + k * 32 < pass.blocks)
            for (int i = 0; i < 2; i++) v[k][i] = load_words(words(row, kind, first + k * 32) + i);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          if (first + k * 32 < pass.blocks)
            for (int i = 0; i < 2; i++) all &= v[k][i].x >> 32 == number && v[k][i].y >> 32 == number;
      } while (!all);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (first + k * 32 < pass.blocks)
          best.merge(Best::of(make_int4(static_cast<int>(v[k][0].x), static_cast<int>(v[k][0].y),
                                        static_cast<int>(v[k][1].x), static_cast<int>(v[k][1].y))));
    }
    __syncwarp();
    for (int step = 1; step < 32; step *= 2) merge_lanes(best, step);
    return best;
  }

  __device__ __forceinline__ void write_outcome(int at, const Highest& highest, const Race& race, bool sampled) const {
    pass.outcome->row[at].token = highest.token;
    pass.outcome->row[at].logit = highest.logit;
    pass.outcome->row[at].finite = highest.finite;
    pass.outcome->row[at].margin = highest.margin();
    if (!sampled) return;
    pass.outcome->race[at].token = race.token;
    pass.outcome->race[at].logit = race.logit;
    pass.outcome->race[at].total = highest.sum;
    pass.outcome->race[at].is_certain = race.is_certain();
  }

  // Makes `token` the row's next, and decides whether it is run. A position that begins a chunk of attention is not:
  // the flags of the chunk's words are not those of a chunk that was there in the step before.
  __device__ __forceinline__ void go_on(int row, const Highest& highest, unsigned token) const {
    const int bin = min(static_cast<int>(highest.margin() * MARGIN_BINS), MARGIN_BINS - 1);
    const float accepted = shared.accepted[row] * pass.acceptance[bin];
    const int position = shared.position[row] + 1;
    shared.accepted[row] = accepted, shared.token[row] = token, shared.position[row] = position;
    const bool begins = !(position & ((1 << shared.chunk_shift[row]) - 1));
    if (highest.finite && accepted >= pass.min_accepted[shared.step] && !begins) atomicOr(&shared.going_on, 1u << row);
  }
};
static_assert(WARPS == MAX_ROWS, "a warp finishes a row");
