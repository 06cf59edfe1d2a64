// A decoder as one persistent cooperative kernel: a block on every multiprocessor, all layers in one loop, and the exit
// is a `break`. A pass takes up to eight rows, of one sequence or of several, through the layers and the head, and may
// go on with the tokens that it chose.
#include "batch.cuh"
#include "cache_fill.cuh"
#include "drafter.cuh"
#include "exit_head.cuh"
#include "prefetch.cuh"

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
  Exits exits;
  unsigned deciding = 0, odd = 0;  // rows; odd: whose first layer's number is
  int next_stop = 0;               // the depth at which the next sequence stops at the latest

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
    if (tid < N) shared.token[tid] = pass.row[tid].token, shared.position[tid] = pass.row[tid].position;
    if (tid < N) shared.accepted[tid] = 1;
    if (!tid) shared.step = shared.going_on = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void prepare_ring(int first_layer, int last_layer) {
    const int warp = threadIdx.x >> 5;
    ring.weights = {slots_of(warp), static_cast<int>(threadIdx.x & 31)};
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
      if (of.criteria) deciding |= 1u << (of.first_row + of.rows - 1);
    }
#pragma unroll
    for (int t = 0; t < N; t++)
      if (t < rows()) odd |= (pass.row[t].first_layer & 1) << t;
    find_next_stop();
    if (tid < rows()) shared.chunk_shift[tid] = chunk_shift(pass.row[tid].position);
    if (tid < MAX_ROWS) shared.stability[tid] = __int_as_float(0x7fffffff);
    load_rotary();
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
    Residual<N> residual{pass, shared, scratch};
    Stages<N> stages{pass, shared, ring, residual, scratch};
    Head<N> head{pass, shared, ring, stages, scratch};
    bool again;
#pragma unroll 1
    do {
      const int layer = run_layers(residual, stages, first_layer, last_layer);
      if (!block_index() && !threadIdx.x) pass.outcome->layers_ended[shared.step] = now();
      if (layer < last_layer) ring.leave_out(SKIP_TO_HEAD, shared.step);
      finish_layers(residual);
      if (pass.logits_rows) head.run();
      again = finish_step(head);
    } while (again);
    ring.finish();
  }

  // The head's input, and the caches of the layers that rows skip.
  __device__ __forceinline__ void finish_layers(Residual<N>& residual) {
    if (pass.has_lenses || skips_filled())
      finish_exits<N>(pass, shared, scratch, exits.depth, odd);
    else if (pass.logits_rows)
      residual.finish(thread_index(), exits, odd);
    if (threadIdx.x < N) shared.scale[threadIdx.x] = HEADROOM;
    sync_block();
  }

  // Returns whether there is another step, with the tokens chosen.
  __device__ __forceinline__ bool finish_step(Head<N>& head) {
    const int step = shared.step;
    const bool writes = !block_index(), may_go_on = step + 1 < pass.steps;
    if (writes || may_go_on) head.collect(writes);
    sync_block();
    const bool again = may_go_on && shared.going_on == pass.logits_rows;
    if (writes && !threadIdx.x) pass.outcome->ended[step] = now(), pass.outcome->steps = step + 1;
    if (!again) {
      if (may_go_on) ring.leave_out(SKIP_TO_END, step);
      return false;
    }
    begin_step(step + 1);
    return true;
  }

  __device__ __forceinline__ void begin_step(int step) {
    // the flags of a row go on alternating
#pragma unroll
    for (int t = 0; t < N; t++)
      if (t < rows()) odd ^= (exits.stopped_at(N == 1 ? 0 : pass.row[t].sequence) & 1) << t;
    exits = {};
    find_next_stop();
    load_rotary();
    sync_block();
    if (!threadIdx.x) shared.step = step, shared.going_on = 0;
    sync_block();
  }

  // The warps that send weights: a lane for each ring.
  __device__ __forceinline__ void produce(int first_layer, int last_layer) {
    constexpr int RINGS = WARPS / SENDING_WARPS;
    const int sender = (threadIdx.x - THREADS) / 32, lane = threadIdx.x % 32, warp = sender * RINGS + lane;
    if (sender < SENDING_WARPS && lane < RINGS) producer(warp, first_layer, last_layer).run(&shared.ring[warp]);
  }

  __device__ __forceinline__ Producer<RING_SLOTS<N>> producer(int warp, int first_layer, int last_layer) const {
    const Source source{shared.tables.piece[warp],
                        shared.layers,
                        pass.head,
                        &shared.tables.last_head[warp],
                        first_layer,
                        last_layer,
                        shared.tables.range[STAGES - 1][warp].y,
                        head_tiles(pass),
                        pass.blocks,
                        pass.steps};
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
      const size_t at = (static_cast<size_t>(table) * pass.capacity + shared.position[t]) * HALF + k;
      shared.rotary[table][t][0][k] = pass.cos[at], shared.rotary[table][t][1][k] = pass.sin[at];
    }
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

  // Rows that start at `layer`. (Where the compiler sees that there are none but in the first layer, it makes other
  // code of the loop, of which SmolLM2's shape took 382 us a token instead of 371.)
  __device__ __forceinline__ unsigned starting_at(int layer) const {
    unsigned starting = 0;
    asm volatile("" : "+r"(starting));
#pragma unroll
    for (int t = 0; t < N; t++)
      if (t < rows() && pass.row[t].first_layer == layer) starting |= 1u << t;
    return starting;
  }

  // Returns the layer at which the last sequence stopped.
  __device__ __forceinline__ int run_layers(Residual<N>& residual, Stages<N>& stages, int first_layer, int last_layer) {
    unsigned active = 0;  // rows that ran the layer before, or that run this one
    int layer = first_layer;
#pragma unroll 1
    for (;; layer++) {
      bool out = false;
#pragma unroll 1
      for (int next = 0; next < STAGES; next++) {
        int stage = next;
        asm volatile("" : "+r"(stage));  // opaque, or the compiler makes a copy of everything for each stage
        const int tid = thread_index();
        const unsigned parities = layer_parities(odd, layer);
        const auto vectors = stages.first_vectors(tid, stage, min(layer, LAYERS - 1));
        if (stage == STAGE_QKV || stage == STAGE_GATE_UP) {
          MARK(layer, stage == STAGE_QKV ? 0 : 6)
          active = begin(tid, residual, stage == STAGE_GATE_UP, layer, first_layer, active);
          MARK(layer, stage == STAGE_QKV ? 2 : 8)
          if (exits.stopped == (1u << sequences()) - 1) {
            out = true;
            break;
          }
        }
        if (stage == STAGE_O) {
          MARK(layer, 3)
          Attention<N>{pass, shared, shared.layers[layer], scratch, parities, tid}.run(active);
          MARK(layer, 4)
          Combine<N>{pass, shared, scratch, active, parities, tid}.run(shared.tables.tiles[STAGE_O].x);
          MARK(layer, 5)
        }
        if (stage == STAGE_DOWN) {
          MARK(layer, 9)
        }
        stages.run(tid, stage, layer, active, parities, vectors, deciding);
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
    }
    return layer;
  }

  // The input of the MLP; or the exits after the layer before, and the input of QKV. `active`: rows that ran what came
  // before. Returns the rows that run what follows.
  __device__ __forceinline__ unsigned begin(int tid, Residual<N>& residual, bool mlp, int layer, int first_layer,
                                            unsigned active) {
    const bool compared = !mlp && deciding && layer > first_layer;
    const Condition condition = compared ? Exits::condition(tid, pass, layer) : Condition{};
    const unsigned starting = mlp ? 0 : starting_at(layer);
    residual.receive(tid, mlp, active, layer_parities(odd, mlp ? layer : layer - 1), compared);
    if (__builtin_expect(starting && layer < LAYERS, 0)) start_rows<N>(pass, shared, scratch, tid, layer, starting);
    sync_block();
    MARK(layer, mlp ? 7 : 1)
    if (mlp) return active;
    if (__builtin_expect(compared || layer >= next_stop, 0)) decide(tid, residual, layer, condition, active);
    if (__builtin_expect(has_features(layer), 0))
      ::take_features<N>(pass, shared, scratch, tid, layer, active, layer_parities(odd, layer - 1));
    return active_at(layer);
  }

  // Whether a trained drafter takes hidden states after `depth` layers. Unused depths are 0.
  __device__ __forceinline__ bool has_features(int depth) const {
    bool has = false;
#pragma unroll
    for (int f = 0; f < MAX_FEATURES; f++) has |= pass.feature_depths[f] == depth;
    return has && depth;
  }

  __device__ __forceinline__ void decide(int tid, const Residual<N>& residual, int depth, const Condition& condition,
                                         unsigned active) {
    const int s = Exits::lane_sequence(tid), present = s < sequences() ? s : 0;
    const int newest = pass.sequence[present].first_row + pass.sequence[present].rows - 1;
    if (tid < MAX_ROWS) shared.stabilities[depth % 3][tid] = shared.stability[tid];
    if (__any_sync(~0u, condition.signal > SIGNAL_STABILITY))
      read_exit_signals<N>(pass, shared, scratch, depth, layer_parities(odd, depth - 1), condition.signal,
                           exits.stopped);
    const bool measured = condition.signal > SIGNAL_STABILITY;
    const float signal =
        measured ? shared.exit_signals[newest][condition.signal - SIGNAL_RISK] : shared.stability[newest];
    int criterion;
    const unsigned stops = exits.decide(tid, pass, depth, condition, signal, criterion);
    if (!stops) return;
    find_next_stop();
    if (!block_index() && tid < 32 && tid % MAX_CRITERIA == 0 && (stops >> s & 1)) {
      auto& outcome = pass.outcome->sequence[shared.step * sequences() + s];
      outcome.depth = depth, outcome.criterion = criterion, outcome.stability = shared.stability[newest];
      for (int i = 0; i < EXIT_SIGNALS; i++) outcome.measured[i] = shared.exit_signals[newest][i];
    }
    if (depth == LAYERS) return;
    const int row = block_index();
    if (row < rows() && has<N>(active, row) && (stops >> pass.row[row].sequence & 1) &&
        !pass.sequence[pass.row[row].sequence].fills)
      save_row<N>(pass, shared, scratch, tid, row, row_parity<N>(layer_parities(odd, depth - 1), row));
  }

  // Whether a sequence has skipped layers whose caches are to be filled. Called by whole warps.
  __device__ __forceinline__ bool skips_filled() const {
    const int s = Exits::lane_sequence(threadIdx.x);
    return __any_sync(~0u, s < sequences() && threadIdx.x % MAX_CRITERIA == 0 && exits.depth < LAYERS &&
                               pass.sequence[s < sequences() ? s : 0].fills);
  }

  __device__ __forceinline__ void find_next_stop() {
    next_stop = LAYERS;
    for (int s = 0; s < sequences(); s++)
      if (!(exits.stopped >> s & 1)) next_stop = min(next_stop, pass.sequence[s].max_depth);
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

// Row `blockIdx.x` of `rows` [][hidden] becomes that of a token of a packed matrix.
extern "C" __global__ void gather_rows(const char* matrix, const int* tokens, half* rows) {
  for (int d = 2 * threadIdx.x; d < HIDDEN; d += 2 * blockDim.x) {
    const float2 v = pair_of_row(matrix, HIDDEN_COLUMNS, tokens[blockIdx.x], d);
    *reinterpret_cast<half2*>(rows + static_cast<size_t>(blockIdx.x) * HIDDEN + d) = __floats2half2_rn(v.x, v.y);
  }
}

constexpr BatchLaunch prefill_product_launch(int tiles) {
  return {THREADS, PREFILL_PRODUCTS_BYTES, PRODUCT_TOKENS, divided_up(tiles, PRODUCT_TILES)};
}
constexpr BatchLaunch ROW_TO_BLOCK = {THREADS, 0, 1, 1}, COOPERATIVE = {THREADS, sizeof(BatchMemories), BATCH_ROWS, 0};

extern "C" __device__ const Facts sedac_facts = {14,
                                                 sizeof(Layer),
                                                 sizeof(Pass),
                                                 sizeof(Outcome),
                                                 ALL_THREADS,
                                                 {SHARED_BYTES<1>, SHARED_BYTES<2>, SHARED_BYTES<4>, SHARED_BYTES<8>},
                                                 MIN_BLOCKS,
                                                 MAX_BLOCKS,
                                                 1u << 20,
                                                 sizeof(Tables),
                                                 SAVED,
                                                 BLOCK_BYTES,
                                                 sizeof(DraftPass),
                                                 sizeof(DraftOutcome),
                                                 DRAFT_THREADS,
                                                 sizeof(DraftShared),
                                                 DRAFT_ROWS,
                                                 sizeof(BatchPass),
                                                 sizeof(BatchOutcome),
                                                 {{THREADS, 0, WARPS, 1},
                                                  prefill_product_launch(QKV_TILES),
                                                  prefill_product_launch(O_TILES),
                                                  prefill_product_launch(GATE_UP_TILES),
                                                  prefill_product_launch(DOWN_TILES),
                                                  {ATTENTION_THREADS, PREFILL_ATTENTION_BYTES, 1, KV_HEADS},
                                                  {THREADS, sizeof(BatchAttentionMemory), 1, KV_HEADS},
                                                  ROW_TO_BLOCK,
                                                  ROW_TO_BLOCK,
                                                  COOPERATIVE,
                                                  COOPERATIVE},
                                                 SCRATCH_BYTES,
                                                 DRAFT_SEQUENCES* DraftScratch::FLOATS * 4,
                                                 sizeof(BatchScratch)};
