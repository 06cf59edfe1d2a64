// Weights never wait for data: each warp owns a ring in shared memory that asynchronous copies fill, in the order in
// which the warp reads its share of every stage of every layer, and then of the head. So memory streams across stages
// and layers, however long a stage waits for its input. (Loads at the time of use: 799 us a token of Qwen2.5-0.5B's
// shape against 481.)
//
// Matrices are packed in blocks, see blocks.cuh, so that a warp's share is contiguous.
//
// Warps beside those that compute send the copies, one lane for each ring, where they can give them their registers.
// (When each warp's first lane did, gate and up took 5.3 us a layer of Qwen2.5-0.5B's shape instead of 3.6.) One warp
// sends, or two of 8-bit weights. (Of 1, 2 and 4, us a token: Qwen2.5-0.5B's shape in fp16 548, 564 and 582, since they
// take issue slots from the others; Mistral-7B's in 8 bits 3343, 3084 and 3098, in 4 bits 2614, 2598 and 2618.)
// Elsewhere each warp fills its own ring, see copies.cuh.
#pragma once
#include "tables.cuh"

constexpr int PIECES_UNDER_WAY = 16;
constexpr int SENDING_WARPS = WEIGHT_BITS == 8 ? 2 : 1;

// What a warp and the lane that fills its ring tell each other. Counts grow for the whole pass.
struct alignas(16) RingState {
  int used_slots, used_pieces;  // by the warp
  int skip;                     // set by the warp: what is left out, see Skip
  int finished;                 // set by the warp: nothing more will be read
  int skipped;                  // set by the lane: the skip that it followed last
  int pieces_sent, slots_sent;  // until then
};

// An exit leaves out the rest of the layers, and the last step of a pass all that may have followed. Of a step: its
// number, twice, plus these.
enum Skip { SKIP_TO_HEAD = 1, SKIP_TO_END };

// What is sent, and where from: for each step of the pass the layers, then the head.
struct Source {
  const Piece* table;
  const Layer* layers;  // in shared memory
  const char* head;
  const int4* last_head;
  int first_layer, last_layer;
  int pieces_of_layer;
  int head_tiles;
  int blocks, steps;
};

// The block's tiles of the head, none where no logits are wanted.
__device__ __forceinline__ int head_tiles(const Pass& pass) {
  return pass.logits_rows ? tile_count(block_index(), HEAD_TILES, pass.blocks) : 0;
}

// A warp's share of them in the round from tile `base` of the block on: tile, first column, end, part | parts << 8.
__device__ __forceinline__ int4 head_share(int warp, int base, int tiles, int blocks, int4 last) {
  return base + WARPS <= tiles ? make_int4(block_index() + (base + warp) * blocks, 0, HIDDEN_COLUMNS, 1 << 8) : last;
}

// Fills the ring of warp `warp`.
template <int SLOTS>
struct Producer {
  unsigned slots, barriers;  // shared addresses
  Source source = {};
  int warp;
  int layer = first_layer(), step = 0;
  int sent = 0, sent_slots = 0, slot = 0;  // pieces, slots, and the next slot
  int at = 0, round = 0, column = -1;  // the next piece: of the layer, or of the head; column -1 is the tile's first

  // By a lane beside the computing warps, until the warp has finished.
  __device__ __forceinline__ void run(volatile RingState* state) {
    int skipped = 0;
#pragma unroll 1
    while (!state->finished) {
      if (const int skip = state->skip; skip != skipped) {
        skipped = skip;
        leave_out(skip);
        state->pieces_sent = sent, state->slots_sent = sent_slots;
        __threadfence_block();
        state->skipped = skip;
      }
      if (!send(state->used_slots, state->used_pieces)) __nanosleep(20);
    }
  }

  __device__ __forceinline__ void leave_out(int skip) {
    const bool to_head = skip % 2 == SKIP_TO_HEAD;
    layer = source.last_layer, step = to_head ? skip / 2 : source.steps - 1;
    round = to_head ? 0 : source.head_tiles, column = -1;
  }

  // The next piece, if there is one and room for it.
  __device__ __forceinline__ bool send(int used_slots, int used_pieces) {
    int count;
    const char* from;
    if (sent - used_pieces >= PIECES_UNDER_WAY) return false;
    const int free = SLOTS - (sent_slots - used_slots);
    if (layer < source.last_layer) {
      const Piece piece = source.table[at];
      count = piece.count;
      if (count > free) return false;
      from = source.layers[layer].matrices[piece.stage] + static_cast<size_t>(piece.offset) * BLOCK_BYTES;
      if (++at == source.pieces_of_layer) at = 0, layer++;
    } else {
      if (round >= source.head_tiles) {
        if (step + 1 >= source.steps) return false;
        step++, layer = first_layer(), at = round = 0;
        return true;
      }
      const int4 share = head_share(warp, round, source.head_tiles, source.blocks, *source.last_head);
      if (column < 0) column = share.y;
      count = min(PIECE, share.z - column);
      if (count > free) return false;
      from = source.head + static_cast<size_t>(share.x * HIDDEN_COLUMNS + column) * BLOCK_BYTES;
      column += count;
      if (column >= share.z) column = -1, round += WARPS;
    }
    if (count <= 0) return true;
    const unsigned barrier = barriers + sent % PIECES_UNDER_WAY * 8;
    announce(barrier, count * BLOCK_BYTES);
    const int before_end = min(count, SLOTS - slot);
    copy_weights(slots + slot * BLOCK_BYTES, from, before_end * BLOCK_BYTES, barrier);
    if (count > before_end)
      copy_weights(slots, from + before_end * BLOCK_BYTES, (count - before_end) * BLOCK_BYTES, barrier);
    conclude(barrier);
    slot += count;
    if (slot >= SLOTS) slot -= SLOTS;
    sent++, sent_slots += count;
    return true;
  }

 private:
  __device__ __forceinline__ int first_layer() const {
    return source.pieces_of_layer ? source.first_layer : source.last_layer;
  }
};

// A warp's ring of SLOTS column blocks, as the warp reads it.
template <int SLOTS>
struct Ring {
  LanePlace<unsigned> weights;  // in the first slot
  unsigned barriers;            // shared address
  volatile RingState* state;    // where another warp fills the ring
  Producer<SLOTS> producer;     // where this one does
  int next = 0;                 // slot that is read next
  int piece = 0;                // its piece
  int used = 0;                 // slots that were read

  // A piece of `count` column blocks times what input(x, first) gives of the blocks from `first` on, added to two
  // accumulators. What was read is given back by give_back, when nobody waits for the products any more.
  template <class Input>
  __device__ __forceinline__ void multiply(int count, float (&c)[4], float (&d)[4], Input input) {
#pragma unroll
    for (int first = 0; first < PIECE; first += BLOCKS_AT_ONCE) {
      if (!QUANTIZED && first >= count) break;
      uint4 x[BLOCKS_AT_ONCE];
      input(x, first);
      if (!first) wait();
      LaneWeights<WEIGHT_BITS> blocks[BLOCKS_AT_ONCE];
      // slots beyond a short piece are read and not used
#pragma unroll
      for (int i = 0; i < BLOCKS_AT_ONCE; i++) {
        const int at = next + first + i, slot = at >= SLOTS ? at - SLOTS : at;
        blocks[i].load(weights, slot * BLOCK_BYTES);
      }
#pragma unroll
      for (int i = 0; i < BLOCKS_AT_ONCE; i++) blocks[i].multiply(c, d, x[i], first + i < count);
    }
    next += count;
    if (next >= SLOTS) next -= SLOTS;
    used += count, piece++;
  }

  // Lets the pieces land that are under way, and goes on with what the `kind` of skip in `step` does not leave out.
  __device__ __forceinline__ void leave_out(Skip kind, int step) {
    const int skip = 2 * step + kind;
    int sent, slots;
    if constexpr (REGISTERS_MOVE) {
      if (!(threadIdx.x & 31)) state->skip = skip;
      __syncwarp();
      while (state->skipped != skip) continue;
      __threadfence_block();
      sent = state->pieces_sent, slots = state->slots_sent;
    } else {
      sent = producer.sent, slots = producer.sent_slots;
      producer.leave_out(skip);
    }
    for (; piece < sent; piece++) wait();
    next = (next + (slots - used)) % SLOTS;
    used = slots;
    give_back();
  }

  __device__ __forceinline__ void finish() {
    __syncwarp();
    if (!(threadIdx.x & 31)) state->finished = 1;
  }

  // Slots that were read are free.
  __device__ __forceinline__ void give_back() {
    __syncwarp();  // every lane has read what will be overwritten
    if constexpr (REGISTERS_MOVE) {
      if (threadIdx.x & 31) return;
      state->used_slots = used;
      state->used_pieces = piece;
    } else {
#pragma unroll 1
      while (producer.send(used, piece)) continue;
    }
  }

 private:
  __device__ __forceinline__ void wait() const {
    wait_for(barriers + piece % PIECES_UNDER_WAY * 8, piece / PIECES_UNDER_WAY & 1);
  }
};
