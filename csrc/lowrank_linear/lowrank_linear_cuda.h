// What the host hands to the CUDA kernels of lowrank_linear. The tensors are those of lowrank_linear.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tarp {
namespace cuda {

// Everything about a call that is not a tensor; tests write these 18 numbers byte by byte.
struct FewRowsForm {
    int rows, in, out, rank, first, outputs;  // T, K, N, r, rows of w1, S = r or r²; first = 0: s = 1
    int tasks, splits, stage;                 // stage: depth of x in shared memory at a time, a multiple of 64
    int x_row, weight_row;                    // elements
    int hidden_activation, activation, full;  // Activation of common/cuda/activations.cuh, twice; 1 for a full Σ
    int x_rows, y_rows;                       // of the tensors, for `read` and `write`
    int wide;                                 // 1: the adapter is float32, 0: it has x's type
    float scaling;                            // where scaling_at is null
};

// x, weight, bias, y are of one half precision. segments [tasks + 1], null for one task. The call's row i
// is row read[i] of x and write[i] of y; null: row i. h, s, u may be null.
struct FewRowsTensors {
    const void *x, *weight, *bias, *V, *U, *w1, *b1, *w2, *b2;
    const int64_t *segments, *read, *write;
    const double* scaling_at;
    void* y;
    float *h, *s, *u, *partials, *middle;
    uint32_t* counts;
};

// The same of a call with many rows; tests write these 9 numbers.
struct ManyRowsForm {
    int rows, in, out, rank, tasks;  // T, K, N, r
    int x_row, weight_row;           // elements
    int x_rows, y_rows;              // of the tensors, for `read` and `write`
};

// All of one half precision; z [T, r] times scaling. segments, read, write as above.
struct ManyRowsTensors {
    const void *x, *weight, *bias, *z, *U;
    const int64_t *segments, *read, *write;
    void* y;
};

struct ManyRowsLaunch {
    int device;
    void* stream;
    bool bf16;
    int tiles;  // of 128 rows
};

struct FewRowsLaunch {
    int device;
    void* stream;
    bool bf16;
    int token_tiles, blocks, shared_bytes;  // token_tiles: of 8 rows, 1, 2, 4 or 8
};

// Starts the kernel of few_rows_cuda.cuh on the stream. Throws std::runtime_error where CUDA refuses.
void lowrank_linear_few_rows(const FewRowsLaunch& launch, const FewRowsTensors& tensors, const FewRowsForm& form);

// Starts the kernel of many_rows_cuda.cuh.
void lowrank_linear_many_rows(const ManyRowsLaunch& launch, const ManyRowsTensors& tensors, const ManyRowsForm& form);

// Starts those of many_rows_sm90_cuda.cuh, for compute capability 9.0 alone. Tiles have 256 columns where `wide`, else
// 128. maps: 256 bytes that start at a multiple of 128. `read` must be null, rows of x and of W must not overlap.
void lowrank_linear_many_rows_sm90(const ManyRowsLaunch& launch, bool wide, const ManyRowsTensors& tensors, void* maps,
                                   const ManyRowsForm& form);

}  // namespace cuda
}  // namespace tarp
