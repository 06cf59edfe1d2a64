// What the host and the kernel exchange. sedac-core/src/backend/cuda/abi.rs mirrors every struct; sizes are compared
// when a module is loaded (Facts).
#pragma once
#include <cuda_fp16.h>

constexpr int MAX_ROWS = 8;

// Rows of a batch, those of them whose logits it gives, and consecutive ones of a sequence whose attention blocks
// share.
constexpr int BATCH_ROWS = 512, BATCH_LOGITS_ROWS = 64, BATCH_GROUP_ROWS = 8;
// Rows of a batch that is one kernel.
constexpr int SMALL_BATCH_ROWS = 64;

// What is measured for exits, beside stability.
constexpr int EXIT_SIGNALS = 4;

// Bins of a token's margin, by which the acceptance of drafts is known.
constexpr int MARGIN_BINS = 8;

// How a kernel of a batch is launched, with a BatchPass, a layer and a stage (tables.cuh): in the x direction a block
// for each `rows` rows, in the y direction `blocks`, or where that is 0 as many as a pass of the chain has.
struct BatchLaunch {
  unsigned threads, shared_bytes;  // of a block
  unsigned rows, blocks;
};

// Kernels of batches, in the order of Facts: batch_start; prefill_product of QKV, O, gate_up and down, and
// prefill_attention; batch_attention, batch_heads and batch_add; and, cooperative, batch_head and batch_whole.
constexpr int BATCH_LAUNCHES = 11;

// What the host has to know of a module.
struct Facts {
  unsigned abi;  // version of this file
  unsigned layer_bytes, pass_bytes, outcome_bytes;
  unsigned threads;          // of a block
  unsigned shared_bytes[4];  // dynamic shared memory of chain_1, chain_2, chain_4 and chain_8
  unsigned min_blocks, max_blocks;
  unsigned max_capacity;        // positions of a cache slot
  unsigned table_bytes;         // of a block, written by prepare
  unsigned saved_floats;        // of a position
  unsigned weight_block_bytes;  // of a matrix
  // Of a trained drafter: of its structs and of a block, and positions that it takes in at once.
  unsigned draft_pass_bytes, draft_outcome_bytes, draft_threads, draft_shared_bytes, draft_rows;
  unsigned batch_pass_bytes, batch_outcome_bytes;
  BatchLaunch batch[BATCH_LAUNCHES];
  unsigned long long scratch_bytes, draft_scratch_bytes, batch_scratch_bytes;
};

// A layer's weights and caches. Matrices are packed: see blocks.cuh.
struct Layer {
  const float *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;  // [hidden], null: none
  const float *query_norm, *key_norm;                                            // [head size], null: none
  const char* matrices[4];                                                       // QKV, O, gate_up, down
  const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;                     // null: none
  half *keys, *values;  // [slot][key-value head][capacity][head size]
  int window;           // positions that a token sees, 0 for all
  int rotary;           // which tables
  // What tells of exits after it, null where there is none: an entropy probe (probe.cuh), a lens (lens.cuh), and an
  // exit head's learned probe (exit_head.cuh).
  const float *probe, *lens, *exit_head;
};

// A row of a pass: one token at one position.
struct Row {
  int token;  // -1: starts from the hidden state saved for its position
  int position;
  int sequence;  // index in Pass::sequence
  int first_layer;
};

// The rows of one sequence: consecutive rows at consecutive positions, whose first layers never grow.
struct SequenceRows {
  int slot, first_row, rows;
  int fills;                           // whether caches of layers that it skips are filled: see cache_fill.cuh
  int max_depth;                       // layers after which it stops at the latest
  int criteria;                        // of its exit rule, 0 for none
  const struct Condition* conditions;  // [criteria][layers]
};

// A row of an exit rule's table, for one depth: see sedac-core/src/policy/rule.rs.
struct Condition {
  unsigned signal;      // 0: none, 1: stability, 2: the entropy probe's risk, 3 and 4: an exit head's margin, learned
  unsigned comparison;  // 0: at least, 1: below, 2: accumulated
  float threshold;
  unsigned run_length;
  float decay, weight, target;
  unsigned may_exit;
};

// By what a token is sampled: see race.cuh.
struct RowRace {
  unsigned long long key;
  float inverse_temperature;
  int unused;
};

struct RowOutcome {
  unsigned token;  // with the highest logit, the lowest of equals
  float logit;
  int finite;    // whether all its logits are
  float margin;  // its probability less that of the second
};

struct RaceOutcome {
  unsigned token;  // that wins the race
  float logit;
  float total;     // sum of exp(logit - the highest) over all tokens
  int is_certain;  // whether rounding cannot have made it win
};

// What came of a pass. What a step gives of a row or of a sequence is at step * (rows or sequences) + its index.
struct Outcome {
  struct {
    int depth;      // layers that ran
    int criterion;  // which said stop, -1 for none
    float stability;
    // The entropy probe's risk, and an exit head's margin, learned signal and entropy; of no meaning where no criterion
    // asks for them after that depth.
    float measured[EXIT_SIGNALS];
    int unused;
  } sequence[MAX_ROWS];
  RowOutcome row[MAX_ROWS];
  RaceOutcome race[MAX_ROWS];                                  // of sampled rows
  unsigned long long started;                                  // globaltimer, ns
  unsigned long long layers_ended[MAX_ROWS], ended[MAX_ROWS];  // by step
  int steps, unused;                                           // that ran
};

struct Pass {
  const Layer* layers;
  const char *embed, *head;
  const float* final_norm;
  const float *cos, *sin;        // [tables][capacity][rotary size / 2]
  float* saved;                  // [slot][capacity][saved floats], hidden states at exits
  char *scratch, *next_scratch;  // this pass's, all zero, and the next one's, which this pass clears
  const char* tables;
  float* logits;  // [step][row][vocabulary]
  Outcome* outcome;
  int capacity, blocks, rows, sequences;
  int clear_rows;        // rows that the pass before used of next_scratch
  unsigned logits_rows;  // bit r: the logits of row r are wanted
  Row row[MAX_ROWS];
  SequenceRows sequence[MAX_ROWS];
  RowRace race[MAX_ROWS];  // [step][row]
  unsigned sampled_rows;   // bit r: the token of row r is sampled; its logits are wanted too
  unsigned number;         // of the pass's first step, counted over all passes
  // Steps that the pass may take: after the first, each row's next token is the one that was chosen for it. Then every
  // sequence has one row, of a token, with logits, those with a rule fill caches, and steps * rows are at most
  // MAX_ROWS.
  int steps;
  int has_lenses;             // whether a layer has one
  int frequent_tokens;        // of exit heads
  int features;               // of a position: hidden states that a trained drafter takes
  const half* frequent_rows;  // [frequent_tokens][hidden], of the head's matrix
  // A further step is taken where the probability that all tokens chosen so far are accepted is at least this, by step.
  float min_accepted[MAX_ROWS];
  float acceptance[MARGIN_BINS];   // of a token, by the bin of its margin
  unsigned short* feature_states;  // [slot][capacity][features][hidden], bf16
  int feature_depths[4];           // layers after which they are taken
  int* chosen;                     // [step][row], tokens; -1 where a logit is not finite
};

// When a row of a batch exits: see batch_exits.cuh.
struct RowRule {
  const Condition* conditions;  // [criteria][layers], which ask for stability and the entropy probe's risk only
  int criteria;
  int freezes;  // whether its hidden state stays as it is then
};

// Tokens at positions of any sequences, through all layers: see batch.cuh. Those of a sequence lie one after another,
// at consecutive positions.
struct BatchPass {
  const Layer* layers;
  const char *embed, *head;  // as in Pass
  const float *final_norm, *cos, *sin;
  struct BatchScratch* scratch;
  float* logits;  // [logits row][vocabulary]
  struct BatchOutcome* outcome;
  const RowRace* races;                  // [logits row]
  const RowRule* rules;                  // [logits row]
  unsigned short* feature_states;        // as in Pass
  int* chosen;                           // [logits row], as in Pass
  unsigned long long sampled, deciding;  // bit i: the token of logits row i is sampled; a rule decides about it
  int capacity, blocks, features;        // as in Pass; blocks: of the passes whose bits it gives
  int feature_depths[4];                 // as in Pass
  int rows, logits_rows;
  int single_rows, groups;  // the first rows, that have attention of their own, and the groups of the others
  struct {
    int token, position, slot;
  } row[BATCH_ROWS];
  unsigned short logits_row[BATCH_LOGITS_ROWS];  // the rows whose logits are wanted
  unsigned short group[BATCH_ROWS];              // the first row of each group, which ends where the next begins
};

// What came of it, by logits row.
struct BatchOutcome {
  RowOutcome row[BATCH_LOGITS_ROWS];
  RaceOutcome race[BATCH_LOGITS_ROWS];  // of sampled rows
  struct {
    int depth, criterion;  // as in Outcome
  } exit[BATCH_LOGITS_ROWS];
  unsigned long long started, layers_ended, ended;  // globaltimer, ns; ended only where there are logits rows
};

// Sequences that a trained drafter drafts for in one launch.
constexpr int DRAFT_SEQUENCES = 8;
// Races of drafted tokens, also of those that are drafted after some were accepted.
constexpr int DRAFT_RACES = 2 * MAX_ROWS;

// What it takes in of one of them, and how far it drafts after that.
struct DraftSequence {
  int slot;
  int start, rows;  // verified positions, of which the model has run all
  int steps;        // tokens to draft at most, 0 for none
  int sampled;      // whether they are sampled
  // -1, or the row of the first position in the pass before, or its logits row in the batch before, which verifies
  // `token`: then the launch takes in positions up to the first at which another token was chosen.
  int verifying_row;
  int token[MAX_ROWS];        // that followed each position
  RowRace race[DRAFT_RACES];  // by drafted token, after the number of positions less one that were accepted
  // Another token is drafted where the probability that all so far are accepted is at least this.
  float min_accepted[MAX_ROWS];
  float acceptance[MARGIN_BINS];  // of a token, by the bin of its probability
};

// What a launch of a trained drafter takes: see drafter.cuh. Its weights are fp16, rows of outputs.
struct DraftPass {
  const half *combine, *join;            // [hidden][features * hidden], [hidden][2 * hidden]
  const half *qkv, *o, *gate_up, *down;  // of its layer
  const half* head;                      // [draft tokens][hidden]
  const half* feature_norms;             // [features][hidden]
  const half *state_norm, *embedding_norm, *attention_norm, *mlp_norm, *norm;  // [hidden]
  const float* frequencies;                                                    // [head size / 2], radians a position
  const int* tokens;               // [draft tokens], of the model's vocabulary
  const char* embed;               // the model's
  const unsigned short* features;  // the model's feature_states
  half *keys, *values;             // [slot][key-value head][capacity][head size]
  float* scratch;
  const int* chosen;             // by the pass or batch before
  struct DraftOutcome* outcome;  // [sequence]
  int capacity, sequences;
  int blocks;  // of each sequence
  int features_of_position, draft_tokens;
  float norm_epsilon;
  DraftSequence sequence[DRAFT_SEQUENCES];
};

struct DraftOutcome {
  unsigned long long started, ended;  // globaltimer, ns
  int tokens;                         // that were drafted
  int rows, followed;                 // positions that were taken in, and the token after the last one
  int unused;
  int token[MAX_ROWS];
  float probability[MAX_ROWS];  // that the drafter gives it
};
