// What becomes of a product's sums: the same numbers as Stages make of them, whose words have a bit less.
#pragma once
#include "batch_factors.cuh"

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

// What a small batch makes of a stage's sums, by all threads of a block: it writes them,
struct WrittenOutputs {
  const RowFactors& factors;
  ProductOutputs outputs;

  __device__ __forceinline__ WrittenOutputs(const BatchPass& pass, const RowFactors& factors, const Layer& layer,
                                            int stage)
      : factors(factors), outputs(pass, layer, stage) {}

  // What does not depend on the stage before, of outputs `output` and 8 more: their bias.
  __device__ __forceinline__ float2 ask(int, int output) const { return outputs.bias_of(output); }
  __device__ __forceinline__ void write(int row, int output, float2 v, float2 bias, bool present) const {
    if (present) outputs.write(row, output / 16 * 8 + output % 8, output, v, factors.scale[row], bias);
  }
};

// or adds those of O, or of down (`mlp`), to the residual stream right away, as add_product does.
struct AddedOutputs {
  const BatchPass& pass;
  const float *factor, *next_norm;  // of the norm before, by row
  const float* bias;                // null: none
  bool mlp;
  int feature;  // of a trained drafter's, -1 for none

  __device__ __forceinline__ AddedOutputs(const BatchPass& pass, const RowFactors& factors, const LayerPair& layers,
                                          bool mlp)
      : pass(pass),
        factor(mlp ? factors.mlp : factors.attention),
        next_norm(mlp ? layers.next.attention_norm : layers.now.mlp_norm),
        bias(mlp ? layers.now.down_bias : layers.now.o_bias),
        mlp(mlp),
        feature(mlp ? feature_at(pass, layers.depth) : -1) {}

  // The residual stream before, which was written two stages ago at the latest, and the weights of the next norm.
  __device__ __forceinline__ float4 ask(int row, int output) const {
    const float* from = pass.scratch->residual[row] + output;
    return make_float4(from[0], from[8], next_norm[output], next_norm[output + 8]);
  }
  // Eight lanes have a row.
  __device__ __forceinline__ void write(int row, int output, float2 v, float4 asked, bool present) const {
    const float scale = factor[row] * (1.f / HEADROOM);
    if (bias) v.x += bias[output], v.y += bias[output + 8];
    const float2 h = make_float2(unflagged(v.x + asked.x), unflagged(v.y + asked.y));
    float squares = __fadd_rn(__fmul_rn(h.x, h.x), __fmul_rn(h.y, h.y));  // as lanes add them that have one each
#pragma unroll
    for (int step = 4; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    const unsigned long long upper = packed_lanes(h.x * asked.z * scale, output & 3),
                             lower = packed_lanes(h.y * asked.w * scale, output & 3);
    if (!present) return;
    BatchScratch& scratch = *pass.scratch;
    scratch.residual[row][output] = h.x, scratch.residual[row][output + 8] = h.y;
    if (output % 4 == 0) {
      *reinterpret_cast<unsigned long long*>(&scratch.input[row][output]) = upper;
      *reinterpret_cast<unsigned long long*>(&scratch.input[row][output + 8]) = lower;
    }
    if (output % 8 == 0) scratch.squares[!mlp][row][output / 16] = unflagged(squares);
    if (feature < 0) return;
    unsigned short* to = feature_place(pass, row, feature);
    to[output] = feature_of(h.x), to[output + 8] = feature_of(h.y);
  }
};
