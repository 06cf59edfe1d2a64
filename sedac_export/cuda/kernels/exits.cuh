// Exit rules on the device: what sedac-core/src/policy/rule.rs interprets on the host.
//
// Every warp of every block computes the same: lane 4 s + c holds what sequence s's criterion c has seen. So nobody
// waits for a decision, and an exit is a `break`.
#pragma once
#include "words.cuh"

// Whether row `row` of up to N is in `rows`.
template <int N>
__device__ __forceinline__ bool has(unsigned rows, int row) {
  return rows >> (N == 1 ? 0 : row) & 1;
}

// Bit r: the parity of the flags of row r in layer `layer`, that of the row's layers so far, of which the first has 1.
// `odd`: rows whose first layer's number is odd.
__device__ __forceinline__ unsigned layer_parities(unsigned odd, int layer) { return layer & 1 ? odd : ~odd; }
template <int N>
__device__ __forceinline__ unsigned row_parity(unsigned parities, int row) {
  return parities >> (N == 1 ? 0 : row) & 1;
}

constexpr int MAX_CRITERIA = 4;
enum Signal : unsigned { SIGNAL_NONE, SIGNAL_STABILITY, SIGNAL_RISK, SIGNAL_MARGIN, SIGNAL_LEARNED };

// What a criterion of a rule has seen so far.
struct Criterion {
  unsigned run = 0;
  float accumulator = 0;

  // Whether it says stop, now that its signal has this value.
  __device__ __forceinline__ bool satisfied(const Condition& condition, float value) {
    if (condition.signal == SIGNAL_NONE) return false;
    bool yes;
    if (condition.comparison == 0) {
      yes = value >= condition.threshold;
    } else if (condition.comparison == 1) {
      yes = value < condition.threshold;
    } else {
      const float share = (condition.threshold - value) / condition.threshold;
      const float gained = share < 0 ? 0.f : share > 1 ? 1.f : share;  // NaN stays NaN
      accumulator = accumulator * condition.decay + gained * condition.weight;
      yes = accumulator >= condition.target;
    }
    run = yes ? run + 1 : 0;
    return run >= condition.run_length && condition.may_exit;
  }
};

struct Exits {
  Criterion seen;
  int depth = 0;         // at which this lane's sequence stopped
  unsigned stopped = 0;  // sequences, a bit each

  __device__ __forceinline__ static int lane_sequence(int tid) { return (tid & 31) / MAX_CRITERIA; }

  // This lane's condition after `depth` layers; loaded before it is needed.
  __device__ __forceinline__ static Condition condition(int tid, const Pass& pass, int depth) {
    const int s = lane_sequence(tid), c = tid % MAX_CRITERIA;
    Condition none = {};
    if (s >= pass.sequences || c >= pass.sequence[s].criteria) return none;
    return pass.sequence[s].conditions[c * LAYERS + depth - 1];
  }

  // `depth` layers have run, and `signal` is the one that this lane's criterion asks for: which sequences stop here, a
  // bit each. `criterion` becomes the one that says so, -1 where the depth does.
  __device__ __forceinline__ unsigned decide(int tid, const Pass& pass, int depth, const Condition& condition,
                                             float signal, int& criterion) {
    const int s = lane_sequence(tid);
    const bool says = seen.satisfied(condition, signal);
    const unsigned ballot = __ballot_sync(~0u, says);
    const unsigned of_sequence = ballot >> s * MAX_CRITERIA & ((1 << MAX_CRITERIA) - 1);
    criterion = of_sequence ? __ffs(of_sequence) - 1 : -1;
    const bool present = s < pass.sequences;
    const bool stops =
        present && !(stopped >> s & 1) && (of_sequence || depth >= pass.sequence[present ? s : 0].max_depth);
    if (stops) this->depth = depth;
    const unsigned lanes = __ballot_sync(~0u, stops && tid % MAX_CRITERIA == 0);
    unsigned now = 0;
#pragma unroll
    for (int i = 0; i < MAX_ROWS; i++) now |= (lanes >> i * MAX_CRITERIA & 1) << i;
    stopped |= now;
    return now;
  }

  // The depth at which `sequence` stopped. Called by whole warps.
  __device__ __forceinline__ int stopped_at(int sequence) const {
    return __shfl_sync(~0u, depth, sequence * MAX_CRITERIA);
  }
};

// The newest rows of the sequences, but for those that stopped, about which a lane's criterion `asks` for something.
__device__ __forceinline__ unsigned rows_that_ask(const Pass& pass, unsigned stopped, bool asks) {
  const unsigned lanes = __ballot_sync(~0u, asks);
  unsigned rows = 0;
#pragma unroll 1
  for (int s = 0; s < pass.sequences; s++)
    if (lanes >> s * MAX_CRITERIA & ((1 << MAX_CRITERIA) - 1) && !(stopped >> s & 1))
      rows |= 1u << (pass.sequence[s].first_row + pass.sequence[s].rows - 1);
  return rows;
}
