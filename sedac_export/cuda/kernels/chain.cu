// A decoder as one persistent cooperative kernel: a block on every multiprocessor, all layers in one loop, and the exit
// is a `break`. A pass takes up to eight rows, of one sequence or of several, through the layers and the head.
#include "exits.cuh"
#include "head.cuh"
#include "prefetch.cuh"

__device__ __forceinline__ unsigned long long now() {
  unsigned long long t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}

// Registers that the warps beside the computing ones need not are the computing ones'. 168 to each of 384 threads are
// 232 to each of 256 and 40 to the others; what is asked for beyond is waited for forever.
__device__ __forceinline__ void give_registers() {
  if constexpr (REGISTERS_MOVE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
__device__ __forceinline__ void take_registers() {
  if constexpr (REGISTERS_MOVE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}

template <int N>
struct Chain {
  const Pass& pass;
  Shared<N>& shared;
  float* scratch;
  Ring<RING_SLOTS<N>> ring;
  float2 input[N == 1 ? PAIRS : 1];  // of the layer, whose stability is asked for; more rows have theirs in the scratch
  int own[PAIRS];                    // which of the block's tiles of O and of down the thread's elements belong to
  Exits exits;
  unsigned frozen = 0, deciding = 0;  // rows
  int next_stop = 0;                  // the depth at which the next sequence stops at the latest

  __device__ __forceinline__ void run() {
    int first_layer = LAYERS, last_layer = 0;
#pragma unroll
    for (int t = 0; t < N; t++)
      if (t < rows()) first_layer = min(first_layer, pass.row[t].first_layer);
    for (int s = 0; s < sequences(); s++) last_layer = max(last_layer, pass.sequence[s].max_depth);
    start();
    if (REGISTERS_MOVE && threadIdx.x >= THREADS) {
      give_registers();
      produce(first_layer, last_layer);
    } else {
      take_registers();
      compute(first_layer, last_layer);
    }
  }

 private:
  __device__ __forceinline__ int rows() const { return N == 1 ? 1 : pass.rows; }
  __device__ __forceinline__ int sequences() const { return N == 1 ? 1 : pass.sequences; }

  // Tables to shared memory, what the warp that sends weights has to know, and the next pass's scratch cleared.
  __device__ __forceinline__ void start() {
    const int tid = threadIdx.x, block = blockIdx.x;
    if (!block && !tid) pass.outcome->started = now();
    if (tid < WARPS) {
      shared.ring[tid] = {};
      for (int i = 0; i < PIECES_UNDER_WAY; i++) init_barrier(shared_address(&shared.barriers[tid][i]));
      publish_barriers();
    }
    copy(&shared.tables, pass.tables + static_cast<size_t>(block) * sizeof(Tables), sizeof(Tables));
    copy(shared.layers, pass.layers, sizeof(shared.layers));
    __syncthreads();
  }

  __device__ __forceinline__ void prepare_ring(int first_layer, int last_layer) {
    const int warp = threadIdx.x >> 5;
    ring.operands = slots_of(warp) + (threadIdx.x & 31) * 16;
    ring.barriers = shared_address(shared.barriers[warp]);
    ring.state = &shared.ring[warp];
    if constexpr (!REGISTERS_MOVE) {
      ring.producer = producer(warp, first_layer, last_layer);
      ring.give_back();
    }
  }

  __device__ __forceinline__ void prepare_rows() {
    const int tid = threadIdx.x, block = blockIdx.x;
    for (int s = 0; s < sequences(); s++) {
      const SequenceRows& of = pass.sequence[s];
      frozen |= ((1u << of.frozen) - 1) << of.first_row;
      if (of.criteria) deciding |= 1u << (of.first_row + of.rows - 1);
    }
    find_next_stop();
    if (!tid) shared.chunk_shift = chunk_shift(pass.capacity);
    load_rotary();
    for (int i = tid; i < 3 * MAX_ROWS * WARPS; i += THREADS) shared.segments[0][i] = 0;
    find_own(tid);
    const int cleared = pass.clear_rows * SCRATCH_ROW / 4;
    for (int i = block * THREADS + tid; i < cleared; i += pass.blocks * THREADS)
      reinterpret_cast<float4*>(pass.next_scratch)[i] = make_float4(0, 0, 0, 0);
    sync_block();
  }

  __device__ __forceinline__ unsigned slots_of(int warp) const {
    return shared_address(&shared) + RING_START<N> + warp * RING_SLOTS<N> * BLOCK_BYTES;
  }

  // The warps that compute.
  __device__ __forceinline__ void compute(int first_layer, int last_layer) {
    prepare_ring(first_layer, last_layer);
    prepare_rows();
    Stages<N> stages{pass, shared, ring, scratch};
    const int layer = run_layers(stages, first_layer, last_layer);
    if (!block_index() && !threadIdx.x) pass.outcome->layers_ended = now();
    if (layer < last_layer) {
      ring.skip_to_head();
      float2 weight[PAIRS], h[N][PAIRS];
      Stability<N> none;
      const int tid = thread_index();
      clear(h);
      load_weight(tid, pass.final_norm, weight);
      load_stopped(tid, stages, h);
      normalise<N>(tid, h, weight, shared.input, shared.segments, none, false);
    }
    Head<N> head{pass, shared, ring, stages, scratch};
    if (pass.logits_rows) head.run();
    ring.finish();
    finish(head);
  }

  // The warp that sends weights.
  __device__ __forceinline__ void produce(int first_layer, int last_layer) {
    const int warp = threadIdx.x - THREADS;
    if (warp < WARPS) producer(warp, first_layer, last_layer).run(&shared.ring[warp]);
  }

  __device__ __forceinline__ Producer<RING_SLOTS<N>> producer(int warp, int first_layer, int last_layer) const {
    const Source source{shared.tables.piece[warp],
                        shared.layers,
                        reinterpret_cast<const char*>(pass.head),
                        &shared.tables.last_head[warp],
                        first_layer,
                        last_layer,
                        shared.tables.range[STAGES - 1][warp].y,
                        head_tiles(pass),
                        pass.blocks};
    return {slots_of(warp), shared_address(shared.barriers[warp]), source, warp};
  }

  __device__ __forceinline__ static void copy(void* to, const void* from, int bytes) {
    for (int i = threadIdx.x; i < bytes / 8; i += ALL_THREADS)
      static_cast<unsigned long long*>(to)[i] = static_cast<const unsigned long long*>(from)[i];
  }

  __device__ __forceinline__ void load_rotary() {
    constexpr int HALF = ROTARY / 2;
    for (int i = threadIdx.x; i < SEDAC_ROTARY_TABLES * rows() * HALF; i += THREADS) {
      const int table = i / (rows() * HALF), t = i / HALF % rows(), k = i % HALF;
      const size_t at = (static_cast<size_t>(table) * pass.capacity + pass.row[t].position) * HALF + k;
      shared.rotary[table][t][0][k] = pass.cos[at], shared.rotary[table][t][1][k] = pass.sin[at];
    }
  }

  __device__ __forceinline__ float* saved(int t) const {
    const SequenceRows& of = pass.sequence[pass.row[t].sequence];
    return pass.saved + (static_cast<size_t>(of.slot) * pass.capacity + pass.row[t].position) * HIDDEN;
  }

  // What a row starts from.
  __device__ __forceinline__ float2 start_of(int t, int d) const {
    const int token = pass.row[t].token;
    if (token < 0) return *reinterpret_cast<const float2*>(saved(t) + d);
    // rows of a packed matrix: 32 columns are contiguous
    const size_t block = (static_cast<size_t>(token / 16) * HIDDEN_COLUMNS + d / 32) * 2 + token % 16 / 8;
    const half2 v = *reinterpret_cast<const half2*>(pass.embed + block * 256 + token % 8 * 32 + d % 32);
    return make_float2(__low2float(v) * SEDAC_EMBEDDING_SCALE, __high2float(v) * SEDAC_EMBEDDING_SCALE);
  }

  __device__ __forceinline__ void find_own(int tid) {
    const int2 o = shared.tables.tiles[STAGE_O], down = shared.tables.tiles[STAGE_DOWN];
    const auto index = [&](int tile, int2 tiles) {  // plus 1; 0: not the block's
      const int from = tile - tiles.y;
      return from >= 0 && from % pass.blocks == 0 && from / pass.blocks < tiles.x ? from / pass.blocks + 1 : 0;
    };
#pragma unroll
    for (int p = 0; p < PAIRS; p++) own[p] = 0;
    for_pairs(fresh<N>(tid), [&](int p, int d) { own[p] = index(d / 16, o) | index(d / 16, down) << 8; });
  }

  // Rows in whose place this thread's blocks will add: before O, or before down.
  __device__ __forceinline__ void stash(int tid, const float2 (&h)[N][PAIRS], bool before_down) {
    for_pairs(fresh<N>(tid), [&](int p, int d) {
      const int index = own[p] >> (before_down ? 8 : 0) & 255;
      if (!index) return;
      float (*to)[16] = before_down ? shared.before_down[index - 1] : shared.before_o[index - 1];
#pragma unroll
      for (int t = 0; t < N; t++) *reinterpret_cast<float2*>(&to[t][d % 16]) = h[t][p];
    });
  }

  // Rows that run `layer`.
  __device__ __forceinline__ unsigned active_at(int layer) const {
    if (N == 1) return exits.stopped ? 0 : 1;
    unsigned active = 0;
#pragma unroll
    for (int t = 0; t < N; t++)
      if (t < rows() && pass.row[t].first_layer <= layer && !(exits.stopped >> pass.row[t].sequence & 1))
        active |= 1u << t;
    return active;
  }

  // Returns the layer at which the last sequence stopped.
  __device__ __forceinline__ int run_layers(Stages<N>& stages, int first_layer, int last_layer) {
    unsigned before = 0;  // rows that ran the layer before
    int layer = first_layer;
#pragma unroll 1
    for (;; layer++) {
      unsigned active = 0;
      bool out = false;
#pragma unroll 1
      for (int next = 0; next < STAGES; next++) {
        int stage = next;
        asm volatile("" : "+r"(stage));  // opaque, or the compiler makes a copy of everything for each stage
        const int tid = thread_index();
        float bias = 0;
        if (stage == STAGE_QKV || stage == STAGE_GATE_UP) {
          active =
              begin(tid, stages, stage, layer, first_layer, last_layer, stage == STAGE_QKV ? before : active, bias);
          if (exits.stopped == (1u << sequences()) - 1) {
            out = true;
            break;
          }
        }
        if (stage == STAGE_O) {
          MARK(layer, 3)
          Attention<N>{pass, shared, shared.layers[layer], scratch, layer, tid}.run(active);
          MARK(layer, 4)
          Combine<N>{pass, shared, scratch, active, layer, tid}.run(shared.tables.tiles[STAGE_O].x);
          MARK(layer, 5)
        }
        if (stage == STAGE_DOWN) {
          MARK(layer, 9)
        }
        stages.run(tid, stage, layer, active, bias);
        if (stage == STAGE_QKV) {
          MARK(layer, 11)
        }
        if (stage == STAGE_O) {
          MARK(layer, 12)
        }
        if (stage == STAGE_GATE_UP) {
          MARK(layer, 13)
        }
        if (stage == STAGE_DOWN) {
          MARK(layer, 10)
        }
        Prefetch<N>{pass, shared, tid}.run(stage, layer, last_layer);
        __syncwarp();
      }
      if (out) break;
      before = active;
    }
    return layer;
  }

  // The residual after the layer before, the exits there, and the norm before QKV; or the residual after attention, and
  // the norm before the MLP. `before`: rows that ran what came before. Returns the rows that run what follows.
  __device__ __forceinline__ unsigned begin(int tid, Stages<N>& stages, int stage, int layer, int first_layer,
                                            int last_layer, unsigned before, float& bias) {
    const bool of_layer = stage == STAGE_QKV;
    MARK(layer, of_layer ? 0 : 6)
    float2 weight[PAIRS], h[N][PAIRS];
    load_weight(tid,
                layer == last_layer ? pass.final_norm
                : of_layer          ? shared.layers[layer].attention_norm
                                    : shared.layers[layer].mlp_norm,
                weight);
    if (of_layer && layer < last_layer) bias = first_bias(tid, layer);
    const bool compared = of_layer && deciding && layer > first_layer;
    const Condition condition = compared ? Exits::condition(tid, pass, layer) : Condition{};
    clear(h);
    receive<N>(
        tid, h, scratch, [&](int t) { return of_layer ? stages.down_offset(t, layer - 1) : SCRATCH_O; },
        of_layer ? DOWN_SPLITS : 1,
        [&](int t) { return of_layer ? stages.down_parity(t, layer - 1) : row_parity(pass, t, layer); }, before);
    if (SEDAC_POST_NORMS) {
      const Layer& of = shared.layers[of_layer ? max(layer - 1, 0) : layer];
      add_normalised<N>(tid, h, before, of_layer ? of.mlp_post_norm : of.attention_post_norm, shared.segments[3],
                        [&](int t, int d) { return *reinterpret_cast<const float2*>(remembered(t, of_layer) + d); });
    }
    load_started(tid, of_layer ? layer : -1, h);
    if (N > 1 && layer == last_layer) load_stopped(tid, stages, h);
    MARK(layer, of_layer ? 1 : 7)
    stash(tid, h, !of_layer);
    Stability<N> stability;
    if (compared) compare(tid, h, stability);
    const float value = normalise<N>(tid, h, weight, shared.input, shared.segments, stability, compared);
    if (!of_layer) {
      if (SEDAC_POST_NORMS) remember(tid, h, before, true);
      MARK(layer, 8)
      return before;
    }
    if (compared || layer >= next_stop) decide(tid, layer, condition, value, before, h);
    const unsigned active = active_at(layer);
    if (SEDAC_POST_NORMS) {
      remember(tid, h, before | active, false);
    } else if (N > 1) {
      if (deciding & active) remember(tid, h, deciding & active, false);
    } else {
#pragma unroll
      for (int p = 0; p < PAIRS; p++) input[N == 1 ? p : 0] = h[0][p];
    }
    MARK(layer, 2)
    return active;
  }

  // Of the thread's first output of QKV.
  __device__ __forceinline__ float first_bias(int tid, int layer) const {
    const int2 tiles = shared.tables.tiles[STAGE_QKV];
    const float* biases = shared.layers[layer].qkv_bias;
    return biases && tid < tiles.x * 16 * N ? biases[(tiles.y + tid / (16 * N) * pass.blocks) * 16 + (tid & 15)] : 0;
  }

  __device__ __forceinline__ static void clear(float2 (&h)[N][PAIRS]) {
#pragma unroll
    for (int t = 0; t < N; t++)
#pragma unroll
      for (int p = 0; p < PAIRS; p++) h[t][p] = make_float2(0, 0);
  }

  // Rows that start at `layer`, and frozen ones, which stay as they are. (What layers make of these is computed and
  // waited for all the same: it is what holds the blocks together.)
  __device__ __forceinline__ void load_started(int tid, int layer, float2 (&h)[N][PAIRS]) const {
#pragma unroll
    for (int t = 0; t < N; t++) {
      if (t >= rows() || (!(frozen >> t & 1) && pass.row[t].first_layer != layer)) continue;
      for_pairs(fresh<N>(tid), [&](int p, int d) { h[t][p] = start_of(t, d); });
    }
  }

  // Rows that stopped at depths up to `layer`: what was received last is still there.
  __device__ __forceinline__ void load_stopped(int tid, Stages<N>& stages, float2 (&h)[N][PAIRS]) const {
#pragma unroll
    for (int t = 0; t < N; t++) {
      if (t >= rows() || !(exits.stopped >> pass.row[t].sequence & 1)) continue;
      const int depth = exits.stopped_at(pass.row[t].sequence);
      if (SEDAC_POST_NORMS) {
        for_pairs(fresh<N>(tid),
                  [&](int p, int d) { h[t][p] = *reinterpret_cast<const float2*>(remembered(t, false) + d); });
        continue;
      }
      const float* from = scratch + t * SCRATCH_ROW + stages.down_offset(t, depth - 1);
      for_pairs(fresh<N>(tid), [&](int p, int d) {
        h[t][p] = make_float2(0, 0);
#pragma unroll
        for (int k = 0; k < DOWN_SPLITS; k++) {
          const float2 v = load2(from + k * HIDDEN + d);
          h[t][p].x += unflagged(v.x), h[t][p].y += unflagged(v.y);
        }
      });
    }
  }

  __device__ __forceinline__ void load_weight(int tid, const float* from, float2 (&weight)[PAIRS]) const {
    for_pairs(fresh<N>(tid), [&](int p, int d) { weight[p] = *reinterpret_cast<const float2*>(from + d); });
  }

  // The residual before attention, or before the MLP.
  __device__ __forceinline__ float* remembered(int t, bool before_mlp) const {
    return scratch + SCRATCH_INPUTS + (static_cast<size_t>(block_index() * 2 + before_mlp) * MAX_ROWS + t) * HIDDEN;
  }

  __device__ __forceinline__ void remember(int tid, const float2 (&h)[N][PAIRS], unsigned rows, bool before_mlp) const {
#pragma unroll
    for (int t = 0; t < N; t++)
      if (has<N>(rows, t))
        for_pairs(fresh<N>(tid),
                  [&](int p, int d) { *reinterpret_cast<float2*>(remembered(t, before_mlp) + d) = h[t][p]; });
  }

  __device__ __forceinline__ void compare(int tid, const float2 (&h)[N][PAIRS], Stability<N>& stability) const {
    stability.clear();
#pragma unroll
    for (int t = 0; t < N; t++)
      if (has<N>(deciding, t)) {
        for_pairs(fresh<N>(tid), [&](int p, int d) {
          stability.note(t,
                         N == 1 && !SEDAC_POST_NORMS ? input[N == 1 ? p : 0]
                                                     : *reinterpret_cast<const float2*>(remembered(t, false) + d),
                         h[t][p]);
        });
      }
  }

  // value: lane 4t has the stability of row t.
  __device__ __forceinline__ void decide(int tid, int depth, const Condition& condition, float value, unsigned before,
                                         const float2 (&h)[N][PAIRS]) {
    const int s = Exits::lane_sequence(tid), present = s < sequences() ? s : 0;
    const int newest = pass.sequence[present].first_row + pass.sequence[present].rows - 1;
    const float stability = __shfl_sync(~0u, value, newest * 4);
    int criterion;
    const unsigned stops = exits.decide(tid, pass, depth, condition, stability, criterion);
    if (!stops) return;
    find_next_stop();
    if (!block_index() && tid < 32 && tid % MAX_CRITERIA == 0 && (stops >> s & 1)) {
      pass.outcome->sequence[s].depth = depth;
      pass.outcome->sequence[s].criterion = criterion;
      pass.outcome->sequence[s].stability = stability;
    }
    if (depth < LAYERS) save(tid, stops, before, h);
  }

  __device__ __forceinline__ void find_next_stop() {
    next_stop = LAYERS;
    for (int s = 0; s < sequences(); s++)
      if (!(exits.stopped >> s & 1)) next_stop = min(next_stop, pass.sequence[s].max_depth);
  }

  // The hidden states of rows that stop with their sequences `stops`; each row by one block.
  __device__ __forceinline__ void save(int tid, unsigned stops, unsigned before, const float2 (&h)[N][PAIRS]) {
#pragma unroll
    for (int t = 0; t < N; t++)
      if (has<N>(before & ~frozen, t) && (stops >> pass.row[t].sequence & 1) && block_index() == t)
        for_pairs(fresh<N>(tid), [&](int p, int d) { *reinterpret_cast<float2*>(saved(t) + d) = h[t][p]; });
  }

  // The last block to come here writes what the head found.
  __device__ __forceinline__ void finish(Head<N>& head) {
    sync_block();
    int* last = reinterpret_cast<int*>(shared.sums[0]);
    if (!threadIdx.x) {
      __threadfence();
      *last = atomicAdd(pass.counters, 1u) == pass.blocks - 1u;
    }
    sync_block();
    if (!*last) return;
    __threadfence();
    head.finish();
    if (threadIdx.x) return;
    *pass.counters = 0;
    pass.outcome->ended = now();
  }
};

template <int N>
__device__ __forceinline__ void run_chain(const Pass& pass) {
  extern __shared__ __align__(128) unsigned char memory[];
  Chain<N> chain{pass, *reinterpret_cast<Shared<N>*>(memory), reinterpret_cast<float*>(pass.scratch)};
  chain.run();
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) chain_1(const __grid_constant__ Pass pass) {
  run_chain<1>(pass);
}
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) chain_2(const __grid_constant__ Pass pass) {
  run_chain<2>(pass);
}
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) chain_4(const __grid_constant__ Pass pass) {
  run_chain<4>(pass);
}
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) chain_8(const __grid_constant__ Pass pass) {
  run_chain<8>(pass);
}

extern "C" __device__ const Facts sedac_facts = {1,
                                                 sizeof(Layer),
                                                 sizeof(Pass),
                                                 sizeof(Outcome),
                                                 ALL_THREADS,
                                                 {SHARED_BYTES<1>, SHARED_BYTES<2>, SHARED_BYTES<4>, SHARED_BYTES<8>},
                                                 MIN_BLOCKS,
                                                 MAX_BLOCKS,
                                                 1u << 20,
                                                 sizeof(Tables),
                                                 SCRATCH_BYTES};
