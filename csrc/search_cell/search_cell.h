// The native kernels of search_cell: out = h + Linear((n0 + n1 + n2) / 3) and its gradients, selected operations only.
//
// Symbols as in tarp_kernels/ops/search_cell: T tokens of width d, C the cell's width. Everything is a raw pointer into
// memory that the caller keeps alive; weights are contiguous float32, with a leading task dimension where `per_task`.
//
// Inside, a row has W floats, C rounded up to whole tiles, and every sequence has kGap rows in front of it, zero or a
// state; so have the rows behind the last one. A convolution of k taps is then a plain product: its input for a token
// are k · W adjacent floats, wherever the token lies.
#pragma once

#include <stdint.h>

#include "built_isas.h"

namespace tarp {

constexpr int kEdges = 9, kOperations = 6, kNodes = 3, kGap = 4;
constexpr int kNodeOf[kEdges] = {0, 0, 1, 1, 1, 2, 2, 2, 2};
constexpr int kInputOf[kEdges] = {0, 1, 0, 1, 2, 0, 1, 2, 3};  // s0, s1, n0, n1

// The affine maps of an edge: linear, the two of glu, conv3, conv5.
constexpr int kMaps = 5;
constexpr int kTaps[kMaps] = {1, 1, 1, 3, 5};
constexpr int kOperationOf[kMaps] = {2, 3, 3, 4, 5};
constexpr int kGluValue = 1, kGluGate = 2, kGlu = 3;

struct CellWeightPointers {
    const float *project, *project_bias, *linear, *linear_bias, *glu, *glu_bias, *conv3, *conv3_bias, *conv5,
        *conv5_bias, *output, *output_bias;
};

struct CellGradientPointers {  // null where no gradient is asked for
    float *project, *project_bias, *linear, *linear_bias, *glu, *glu_bias, *conv3, *conv3_bias, *conv5, *conv5_bias,
        *output, *output_bias;
};

struct SearchCell {
    int64_t tokens, d, width;  // T, d, C
    int64_t sequences, tasks;
    const int64_t* offsets;         // [sequences + 1] tokens
    const int64_t* task_sequences;  // [tasks + 1] sequences
    bool causal, per_task, bf16;    // bf16: dtype of x, h, out, dout
    const char *x, *h;              // [T, d]: what the projections see, and what out adds to
    CellWeightPointers weights;     // null where no task selected the operation
    const float* alpha;             // [tasks, 9, 6]
    int threads;

    int64_t inner() const { return (width + 31) / 32 * 32; }          // W, whole tiles for every instruction set
    int64_t rows() const { return tokens + kGap * (sequences + 1); }  // of every inner array
    int64_t array() const { return rows() * inner(); }                // floats of one
    int64_t slots() const;                                            // affine maps that some task selected
};

struct SearchCellForward {
    char* out;
    // Null when backward will not run:
    float* nodes;     // [5, rows, W]: s0, s1, n0, n1, n2
    uint8_t* active;  // [slots, rows, W]: where an operation's relu lets through
    // Null where sequences begin and end with this call; causal cells only:
    const float* state;  // [sequences, 4, kGap, C]: s0, s1, n0, n1 of the tokens before
    float* state_after;
};

struct SearchCellBackward {
    const char* dout;
    const float* nodes;
    const uint8_t* active;
    char* dx;       // null where no gradient is asked for
    bool residual;  // dx includes dout
    float* dalpha;  // [tasks, 9, 6] or null
    CellGradientPointers gradients;
};

// Both return the number of C × C products that ran, counted by token.
int64_t search_cell_forward(const SearchCell& op, const SearchCellForward& io);
int64_t search_cell_backward(const SearchCell& op, const SearchCellBackward& io);

#define TARP_DECLARE(isa)                                                             \
    namespace isa {                                                                   \
    int64_t search_cell_forward(const SearchCell& op, const SearchCellForward& io);   \
    int64_t search_cell_backward(const SearchCell& op, const SearchCellBackward& io); \
    }
TARP_BUILT_ISAS(TARP_DECLARE)
#undef TARP_DECLARE

}  // namespace tarp
