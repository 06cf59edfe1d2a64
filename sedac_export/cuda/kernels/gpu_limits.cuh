// What GPUs differ in.
#pragma once

// Dynamic shared memory that a block may have, in bytes.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int SHARED_LIMIT = __CUDA_ARCH__ == 800 ? 166912 : 101376;
#else
constexpr int SHARED_LIMIT = 232448;
#endif

// Whether setmaxnreg moves registers from some of a block's warps to others. PTX for GPUs to come does without. Where
// it does not, registers or shared memory are scarce: attention takes fewer keys at a time, and rings have smaller
// pieces.
#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
constexpr bool REGISTERS_MOVE = true;
#else
constexpr bool REGISTERS_MOVE = false;
#endif
