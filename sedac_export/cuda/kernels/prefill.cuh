// Prefill: up to PREFILL_ROWS consecutive tokens of one sequence through all layers, for what they leave in caches.
//
// A kernel for each stage, since so many tokens keep the multiprocessors busy. Each number has the bits that a pass of
// the chain gives it, so nobody can tell which of the two filled a cache.
#pragma once
#include "prefill_products.cuh"

// A row to each block: queries, and keys and values to the caches, rotated and rounded.
extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_heads(const __grid_constant__ PrefillPass pass, int layer, int) {
  constexpr int QUARTERS = HEAD / 4;
  const Layer& of = pass.layers[layer];
  const int row = blockIdx.x, position = pass.start + row;
  const size_t tables = (static_cast<size_t>(of.rotary) * pass.capacity + position) * (ROTARY / 2);
  for (int i = threadIdx.x; i < (HEADS + 2 * KV_HEADS) * QUARTERS; i += THREADS) {
    const int head = i / QUARTERS, kv_head = (head - HEADS) % KV_HEADS;
    const bool query = head < HEADS, value = head >= HEADS + KV_HEADS;
    const int2 at = quarter_of_head(i % QUARTERS, !value);
    const float* from = pass.scratch->products[row] + head * HEAD;
    float2 u = *reinterpret_cast<const float2*>(from + at.x), v = *reinterpret_cast<const float2*>(from + at.y);
    if (!value) {
      if (SEDAC_QUERY_KEY_NORM) normalise_head(u, v, query ? of.query_norm : of.key_norm, at.x, at.y, threadIdx.x);
      if (at.x < ROTARY) rotate(u, v, pass.cos + tables + at.x, pass.sin + tables + at.x);
    }
    const size_t cached = ((static_cast<size_t>(pass.slot) * KV_HEADS + kv_head) * pass.capacity + position) * HEAD;
    half* to = query ? pass.scratch->queries[row] + head * HEAD : (value ? of.values : of.keys) + cached;
    *reinterpret_cast<unsigned*>(to + at.x) = packed(u.x, u.y);
    *reinterpret_cast<unsigned*>(to + at.y) = packed(v.x, v.y);
  }
}
