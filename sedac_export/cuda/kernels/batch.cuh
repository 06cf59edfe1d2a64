// Batches: more rows than a pass takes, of any sequences, through all layers, also after an exit. A kernel for each
// stage, since so many keep the multiprocessors busy. Each number has the bits that a pass gives it, so nobody can tell
// which of the two filled a cache or gave logits; only margins, and totals of races, are sums in another order.
//
// What is launched: batch_start; for each layer a product of QKV, batch_heads, attention, a product of O, batch_add, a
// product of gate_up and of down, and batch_add; and where logits are wanted batch_finish, batch_head,
// batch_candidates and batch_choose. Up to 64 rows have products by batch_product and attention by batch_attention; of
// more rows, products are prefill_product's, and attention of consecutive tokens, whose blocks share keys,
// prefill_attention's.
#pragma once
#include "batch_attention.cuh"
#include "batch_head.cuh"
#include "batch_residual.cuh"
#include "prefill_attention.cuh"
#include "prefill_products.cuh"
