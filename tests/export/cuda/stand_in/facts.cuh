#pragma once
#include "structs.cuh"
struct Facts {
  unsigned abi, layer_bytes, pass_bytes, outcome_bytes, threads, shared_bytes[4];
  unsigned min_blocks, max_blocks, max_capacity, table_bytes, saved_floats, weight_block_bytes;
  unsigned draft_pass_bytes, draft_outcome_bytes, draft_threads, draft_shared_bytes, draft_rows;
  unsigned batch_pass_bytes, batch_outcome_bytes, batch[11][4];
  unsigned long long scratch_bytes, draft_scratch_bytes, batch_scratch_bytes;
};
extern "C" __constant__ Facts sedac_facts = {STRUCTS, 256, {100, 200, 400, 800}, 1, 1, 1, 1, 1,
                                              64 * SEDAC_WEIGHT_BITS + (SEDAC_WEIGHT_BITS < 16) * (32 + 16 * SEDAC_ZERO_POINTS),
                                              DRAFT_STRUCTS, 512, 100, 8, BATCH_STRUCTS, {}, 1, 1, 1};
