// What the host hands to the CUDA kernel that makes z for many rows. The tensors are those of lowrank_linear.h.
#pragma once

#include <cstdint>

namespace tarp {
namespace cuda {

// Everything about a call that is not a tensor; tests write these 14 numbers byte by byte.
struct SkinnyForm {
    int rows, in, rank, first, outputs;  // T, K, r, rows of w1, S = r or r²; first = 0: s = 1
    int tasks, splits;
    int x_row, x_rows;                        // elements; rows of x, for `read`
    int hidden_activation, activation, full;  // Activation of common/cuda/activations.cuh, twice; 1 for a full Σ
    int wide;                                 // 1: the adapter is float32, 0: it has x's type
    float scaling;                            // where scaling_at is null
};

// x and z are of one half precision. segments [tasks + 1], null for one task. The call's row i is row read[i] of x;
// null: row i. h, s, u may be null. partials [tiles, splits, 64, r + first] and counts [tiles], which are zeros before
// and after, are null with one split.
struct SkinnyTensors {
    const void *x, *V, *w1, *b1, *w2, *b2;
    const int64_t *segments, *read;
    const double* scaling_at;
    void* z;
    float *h, *s, *u, *partials;
    uint32_t* counts;
};

// Starts the kernel of skinny_cuda.cuh for `tiles` tiles of 64 rows on the stream. columns: 16, 32, 64 or 128, at least
// r + first. Throws std::runtime_error where CUDA refuses.
void lowrank_linear_skinny(int device, void* stream, bool bf16, int tiles, int columns, const SkinnyTensors& tensors,
                           const SkinnyForm& form);

}  // namespace cuda
}  // namespace tarp
