// What becomes of a product's sums: the same numbers as Stages make of them, whose words have a bit less.
#pragma once
#include "batch_rows.cuh"

struct ProductOutputs {
  BatchScratch& scratch;
  const float* bias;  // null: none
  int stage;

  __device__ __forceinline__ ProductOutputs(const BatchPass& pass, const Layer& layer, int stage)
      : scratch(*pass.scratch),
        bias(stage == STAGE_QKV       ? layer.qkv_bias
             : stage == STAGE_O       ? layer.o_bias
             : stage == STAGE_GATE_UP ? layer.gate_up_bias
                                      : layer.down_bias),
        stage(stage) {}

  // Of outputs `output` and 8 more.
  __device__ __forceinline__ float2 bias_of(int output) const {
    return bias ? make_float2(bias[output], bias[output + 8]) : make_float2(0, 0);
  }

  // The sums of outputs `output` and 8 more of a row, which are gate and up of `inner`. `of_outputs`: their bias.
  __device__ __forceinline__ void write(int row, int inner, int output, float2 v, float scale,
                                        float2 of_outputs) const {
    if (stage == STAGE_GATE_UP) {
      float gate = v.x * scale, up = v.y * scale;
      if (bias) gate += of_outputs.x, up += of_outputs.y;
      const unsigned word = __half_as_ushort(__float2half(activation(gate) * up));
      scratch.activations[row][inner] = __ushort_as_half(inner % 4 ? word : with_room(word));
      return;
    }
    float* to = scratch.products[row] + output;
    if (stage == STAGE_QKV) {
      to[0] = unflagged(fmaf(v.x, scale, of_outputs.x)), to[8] = unflagged(fmaf(v.y, scale, of_outputs.y));
    } else {
      to[0] = v.x + of_outputs.x, to[8] = v.y + of_outputs.y;
    }
  }
};
