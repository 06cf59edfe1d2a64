// Attention over the cache, by chunks of keys: every chunk of every key-value head is some block's, and gives a partial
// sum for each row and query head that combine.cuh weighs and adds.
//
// Two tokens' query heads, up to eight of each, lie in the mma's rows; more tokens are other blocks' work. (All eight
// in one block: 15 us a layer of Qwen2.5-0.5B's shape for eight rows.) A chunk is the same keys whatever rows are asked
// for, and is taken KEYS at a time from its beginning, so a row's sums do not depend on others.
//
// Keys and values of the pass's own rows come from the scratch, rotated and rounded here; the block whose chunk they
// lie in writes them to the cache.
#pragma once
#include "heads.cuh"
#include "residual.cuh"

// The rows of one sequence that run a layer.
struct ActiveRows {
  int first;  // row
  int count;
  int start;  // position of the first
  int slot;
};
template <int N>
__device__ __forceinline__ ActiveRows active_rows(const Pass& pass, const Shared<N>& shared, int sequence,
                                                  unsigned active) {
  if (N == 1) return {0, 1, shared.position[0], pass.sequence[0].slot};
  const SequenceRows& rows = pass.sequence[sequence];
  const unsigned mine = active >> rows.first_row & ((1u << rows.rows) - 1);
  const int skipped = mine ? __ffs(mine) - 1 : rows.rows;  // rows that start deeper come first
  const int first = rows.first_row + skipped;
  return {first, rows.rows - skipped, mine ? shared.position[first] : 0, rows.slot};
}

// Keys to a chunk of a row at `position`, as a power of two: as few as leave it at most FEW chunks, and from 512 keys
// on MAX_CHUNKS, since partial sums are combined a few at a time, one trip to L2 after another. (With 16 chunks of 128
// and of 256 keys, SmolLM2's shape took 465 us at position 2500 instead of 422, and 603 at 5000 instead of 504; five
// rows of three shapes took from 5 % less to 16 % more.) Rows of a sequence have the same in a pass: positions at which
// it changes are powers of two from 1024 on, and there the host begins another one.
__device__ __forceinline__ int chunk_shift(int position) {
  constexpr int LONG = 9, FEW = MAX_CHUNKS < 32 ? MAX_CHUNKS : 32;
  int shift = KEYS == 64 ? 6 : 7;
  while (position >= (shift < LONG ? FEW : MAX_CHUNKS) << shift) shift++;
  return shift;
}

template <int N>
struct Attention {
  const Pass& pass;
  Shared<N>& shared;
  const Layer& layer;
  float* scratch;
  unsigned parities;
  int tid;

  static constexpr int UNITS = divided_up(HEAD / 8, WARPS);  // of 16 rows by 8 numbers of the output, a warp
  static constexpr int LOADS = KEYS * HEAD / 8, LOADS_OF_THREAD = LOADS / THREADS;  // of 16 bytes
  static_assert(LOADS % THREADS == 0, "head size");

  struct Sums {
    float even[UNITS][4], odd[UNITS][4], total[UNITS][2];
  };
  // What a block takes: the keys of one chunk, for two of a sequence's rows.
  struct Item {
    ActiveRows rows;
    int token;  // the first of the two
    int kv_head, chunk;
  };

  __device__ __forceinline__ void run(unsigned active) {
    const int blocks = pass.blocks;
    int next = blocks - 1 - block_index();  // the block's next item, from the sequence's first on
    bool again = false;
#pragma unroll 1
    for (int s = 0; s < (N == 1 ? 1 : pass.sequences); s++) {
      const ActiveRows rows = active_rows<N>(pass, shared, s, active);
      if (!rows.count) continue;
      const int shift = shared.chunk_shift[rows.first];
      const int chunks = ((rows.start + rows.count - 1) >> shift) + 1, pairs = N == 1 ? 1 : (rows.count + 1) / 2,
                items = KV_HEADS * chunks * pairs;
#pragma unroll 1
      for (; next < items; next += blocks) {
        if (again) sync_block();
        const int of_chunk = next / KV_HEADS;
        const int pair = N <= 2 ? 0 : of_chunk / chunks;
        attend({rows, pair * 2, next % KV_HEADS, of_chunk - pair * chunks}, shift);
        again = true;
      }
      next -= items;
    }
  }

 private:
  __device__ __forceinline__ void attend(const Item& item, int shift) {
    const ActiveRows& rows = item.rows;
    Sums sums;
#pragma unroll
    for (int q = 0; q < UNITS; q++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums.even[q][e] = sums.odd[q][e] = sums.total[q][e & 1] = 0;
    // flags alternate from layer to layer also where a window hides the chunk
    const bool seen = !layer.window || (item.chunk + 1) << shift > rows.start - layer.window + 1;
    const int subs = 1 << shift - (KEYS == 64 ? 6 : 7);
    int sub = 0;
#pragma unroll 1
    for (; seen && sub < subs; sub++) {
      const int first_key = (item.chunk << shift) + sub * KEYS;
      if (sub && first_key >= rows.start + rows.count) break;
      if (sub) sync_block();
      load_cache(rows, item.kv_head, first_key);
      load_rows(item, first_key, sub);
      sync_block();
      weigh(item, first_key, sub);
      add_values(sums, sub);
    }
    write(item, shift, sums, sub - 1);
  }

  // Old keys and values do not depend on this layer: they are fetched before the new ones are waited for, all loads
  // before the first store (with each store after its load they ran one by one).
  __device__ __forceinline__ void load_cache(const ActiveRows& rows, int kv_head, int first_key) {
    const int tid = fresh<N>(this->tid);
    const size_t first = (static_cast<size_t>(rows.slot) * KV_HEADS + kv_head) * pass.capacity + first_key;
    const half *keys = layer.keys + first * HEAD, *values = layer.values + first * HEAD;
    const int old = rows.start - first_key, end = old + rows.count;  // of old keys, and of the pass's own
    uint4 loaded[2][LOADS_OF_THREAD];
#pragma unroll
    for (int q = 0; q < LOADS_OF_THREAD; q++) {
      const int2 at = part(tid, q);
      loaded[0][q] = loaded[1][q] = make_uint4(0, 0, 0, 0);
      if (at.x >= old) continue;
      loaded[0][q] = load_cached(keys + at.x * HEAD + at.y);
      loaded[1][q] = load_cached(values + at.x * HEAD + at.y);
    }
#pragma unroll
    for (int q = 0; q < LOADS_OF_THREAD; q++) {
      const int2 at = part(tid, q);
      if (at.x >= old && at.x < end) continue;
      *reinterpret_cast<uint4*>(&shared.keys[at.x][at.y]) = loaded[0][q];
      *reinterpret_cast<uint4*>(&shared.values[at.x][at.y]) = loaded[1][q];
    }
  }

  // The q-th 16 bytes of keys, and of values, that a thread loads: row, element. One division where the threads' are
  // whole rows.
  __device__ __forceinline__ static int2 part(int tid, int q) {
    constexpr int PARTS = HEAD / 8;
    if (THREADS % PARTS == 0) return make_int2(tid / PARTS + q * (THREADS / PARTS), tid % PARTS * 8);
    const int i = tid + q * THREADS;
    return make_int2(i / PARTS, i % PARTS * 8);
  }

  // From L2: another block may have written them in the step before.
  __device__ __forceinline__ static uint4 load_cached(const half* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
  }

  // A quarter of a head, see heads.cuh.
  struct Quarter {
    enum { NONE, QUERY, KEY, VALUE } of;
    int token, in_group, low, high;
  };
  // The i-th of the queries of the item's two rows, then of keys, then of values of all of the pass's own.
  __device__ __forceinline__ Quarter quarter(const Item& item, int i, int first_key, int sub) const {
    constexpr int QUARTERS = HEAD / 4;
    const int tokens = item.rows.count, queries = (N == 1 ? 1 : min(2, tokens - item.token)) * GROUP * QUARTERS,
              keys = queries + tokens * QUARTERS;
    if (i >= keys + tokens * QUARTERS) return {Quarter::NONE};
    const bool query = i < queries, rotates = i < keys;
    const int j = i - (query ? 0 : rotates ? queries : keys), part = j % QUARTERS, head = j / QUARTERS;
    const int token = N == 1 ? 0 : query ? item.token + head / GROUP : head;
    const int key = item.rows.start + token - first_key;
    if (query ? sub > 0 : key < 0 || key >= KEYS) return {Quarter::NONE};
    const int2 of_head = quarter_of_head(part, rotates);
    return {query     ? Quarter::QUERY
            : rotates ? Quarter::KEY
                      : Quarter::VALUE,
            token, head % GROUP, of_head.x, of_head.y};
  }

  // Queries, and keys and values of the pass's own rows, as they arrive.
  __device__ __forceinline__ void load_rows(const Item& item, int first_key, int sub) {
    constexpr int MOST = (N == 1 ? 1 : 2) * GROUP * (HEAD / 4) + N * (HEAD / 2), AT_ONCE = MOST > THREADS ? 2 : 1;
    const int all =
        (N == 1 ? 1 : min(2, item.rows.count - item.token)) * GROUP * (HEAD / 4) + item.rows.count * (HEAD / 2);
#pragma unroll 1
    for (int first = fresh<N>(tid); first < all; first += AT_ONCE * THREADS) {
      float2 u[AT_ONCE], v[AT_ONCE];
      Quarter quarters[AT_ONCE];
      unsigned stale_bits;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) quarters[k] = quarter(item, first + k * THREADS, first_key, sub);
      do {
        stale_bits = 0;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
          const Quarter& q = quarters[k];
          if (q.of == Quarter::NONE) continue;
          const int head = q.of == Quarter::QUERY ? item.kv_head * GROUP + q.in_group
                                                  : HEADS + (q.of == Quarter::VALUE) * KV_HEADS + item.kv_head;
          const float* from = scratch + (item.rows.first + q.token) * SCRATCH_ROW + SCRATCH_QKV + head * HEAD;
          u[k] = load2(from + q.low), v[k] = load2(from + q.high);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
          if (quarters[k].of == Quarter::NONE) continue;
          const unsigned parity = row_parity<N>(parities, item.rows.first + quarters[k].token);
          stale_bits |= stale(u[k], parity) | stale(v[k], parity);
        }
      } while (stale_bits & 1);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (quarters[k].of != Quarter::NONE) place(item, quarters[k], u[k], v[k], first_key);
    }
  }

  // To shared memory, rotated; by one of the blocks with this chunk also to the cache.
  __device__ __forceinline__ void place(const Item& item, const Quarter& q, float2 u, float2 v, int first_key) {
    const bool query = q.of == Quarter::QUERY, value = q.of == Quarter::VALUE;
    u = make_float2(unflagged(u.x), unflagged(u.y)), v = make_float2(unflagged(v.x), unflagged(v.y));
    if (!value) {
      if (SEDAC_QUERY_KEY_NORM) normalise_head(u, v, query ? layer.query_norm : layer.key_norm, q.low, q.high, tid);
      const auto& tables = shared.rotary[layer.rotary][item.rows.first + q.token];
      if (q.low < ROTARY) rotate(u, v, tables[0] + q.low, tables[1] + q.low);
    }
    const unsigned lower = packed(u.x, u.y), upper = packed(v.x, v.y);
    const int key = item.rows.start + q.token - first_key;
    half* to = query   ? shared.queries[(q.token - item.token) * 8 + q.in_group]
               : value ? shared.values[key]
                       : shared.keys[key];
    *reinterpret_cast<unsigned*>(to + q.low) = lower, *reinterpret_cast<unsigned*>(to + q.high) = upper;
    if (query || item.token) return;
    half* cache =
        (value ? layer.values : layer.keys) +
        ((static_cast<size_t>(item.rows.slot) * KV_HEADS + item.kv_head) * pass.capacity + item.rows.start + q.token) *
            HEAD;
    *reinterpret_cast<unsigned*>(cache + q.low) = lower, *reinterpret_cast<unsigned*>(cache + q.high) = upper;
  }

  // The largest score of a row so far.
  __device__ __forceinline__ float maximum(int row, int sub) const {
    float x = sub ? shared.running[sub & 1][row] : -1e30f;
#pragma unroll
    for (int k = 0; k < KEY_TILES; k += 4) {
      const float4 v = *reinterpret_cast<const float4*>(&shared.maxima[row][k]);
      x = fmaxf(fmaxf(x, fmaxf(v.x, v.y)), fmaxf(v.z, v.w));
    }
    return x;
  }

  // Scores, in base 2, and from them probabilities relative to the row's largest score so far.
  __device__ __forceinline__ void weigh(const Item& item, int first_key, int sub) {
    const int tid = fresh<N>(this->tid), key_tile = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    float score[2][4];
    if (key_tile < KEY_TILES) {
      const unsigned queries = shared_address(shared.queries), keys = shared_address(shared.keys);
#pragma unroll
      for (int e = 0; e < 4; e++) score[0][e] = score[1][e] = 0;
#pragma unroll
      for (int k = 0; k < HEAD / 16; k++) {
        unsigned a[4], b[4];
        load_matrix(a, queries + ((lane & 15) * HEAD_ROW + k * 16 + (lane >> 4) * 8) * 2);
        load_matrix(
            b, keys + ((key_tile * 16 + (lane & 7) + (lane >> 4) * 8) * HEAD_ROW + k * 16 + (lane >> 3 & 1) * 8) * 2);
        mma(score[0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma(score[1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
      float largest[2] = {-1e30f, -1e30f};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int upper = e >> 1 & 1, key = first_key + key_tile * 16 + (e >> 2) * 8 + 2 * t + (e & 1);
        const int distance = item.rows.start + item.token + upper - key;
        float& v = score[e >> 2][e & 3];
        v = distance >= 0 && (!layer.window || distance < layer.window) ? scaled(v) : -1e30f;
        largest[upper] = fmaxf(largest[upper], v);
      }
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        float& x = largest[upper];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        if (!t) shared.maxima[upper * 8 + g][key_tile] = x;
      }
    }
    sync_block();
    if (key_tile < KEY_TILES) {
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const int row = upper * 8 + g;
        const float largest = maximum(row, sub);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float p = score[n][upper * 2], q = score[n][upper * 2 + 1];
          p = p > -1e29f ? power_of_2(p - largest) : 0.f, q = q > -1e29f ? power_of_2(q - largest) : 0.f;
          sum += p + q;
          *reinterpret_cast<unsigned*>(&shared.probabilities[row][key_tile * 16 + n * 8 + 2 * t]) = packed(p, q);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (!t) {
          shared.totals[row][key_tile] = sum;
          if (!key_tile) shared.running[(sub + 1) & 1][row] = largest;
        }
      }
    }
    sync_block();
  }

  // Probabilities times values, added to what came of the chunk's keys before.
  __device__ __forceinline__ void add_values(Sums& sums, int sub) {
    const int tid = fresh<N>(this->tid), warp = tid >> 5, lane = tid & 31, g = lane >> 2;
    const unsigned probabilities = shared_address(shared.probabilities), values = shared_address(shared.values);
#pragma unroll
    for (int q = 0; q < UNITS; q++) {
      const int column = (warp + q * WARPS) * 8;
      if (column >= HEAD) break;
      if (sub) {
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
          const int row = upper * 8 + g;
          const float f = power_of_2(shared.running[sub & 1][row] - shared.running[(sub + 1) & 1][row]);
          sums.total[q][upper] *= f;
          sums.even[q][upper * 2] *= f, sums.even[q][upper * 2 + 1] *= f;
          sums.odd[q][upper * 2] *= f, sums.odd[q][upper * 2 + 1] *= f;
        }
      }
#pragma unroll
      for (int k = 0; k < KEYS / 32; k++) {
        unsigned a[4], b[4], v[4];
        const unsigned row = probabilities + ((lane & 15) * KEY_ROW + k * 32 + (lane >> 4) * 8) * 2;
        load_matrix(a, row), load_matrix(b, row + 32);
        load_transposed(v, values + ((k * 32 + lane) * HEAD_ROW + column) * 2);
        mma(sums.even[q], a[0], a[1], a[2], a[3], v[0], v[1]);
        mma(sums.odd[q], b[0], b[1], b[2], b[3], v[2], v[3]);
      }
      if (!column) {
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
          float x = 0;
#pragma unroll
          for (int k = 0; k < KEY_TILES; k++) x += shared.totals[upper * 8 + g][k];
          sums.total[q][upper] += x;
        }
      }
    }
  }

  // The chunk's partial sums; sub: the last that was taken, -1 for none.
  __device__ __forceinline__ void write(const Item& item, int shift, const Sums& sums, int sub) {
    const int tid = fresh<N>(this->tid), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int q = 0; q < UNITS; q++) {
      const int column = (warp + q * WARPS) * 8;
      if (column >= HEAD) break;
#pragma unroll
      for (int upper = 0; upper < (N == 1 ? 1 : 2); upper++) {
        const int token = item.token + upper, row = item.rows.first + token;
        if (g >= GROUP || token >= item.rows.count || item.chunk > item.rows.start + token >> shift) continue;
        const unsigned parity = row_parity<N>(parities, row);
        float* to = scratch + row * SCRATCH_ROW;
        const int index = (item.kv_head * GROUP + g) * MAX_CHUNKS + item.chunk;
        store2(to + SCRATCH_PARTIAL + index * HEAD + column + 2 * t,
               flagged(sums.even[q][upper * 2] + sums.odd[q][upper * 2], parity),
               flagged(sums.even[q][upper * 2 + 1] + sums.odd[q][upper * 2 + 1], parity));
        if (!column && !t) {
          const float largest = sub < 0 ? -1e30f : shared.running[(sub + 1) & 1][upper * 8 + g];
          store2(to + SCRATCH_SOFTMAX + index * SECTOR, flagged(largest, parity),
                 flagged(sums.total[q][upper], parity));
        }
      }
    }
    __syncwarp();
  }
};
