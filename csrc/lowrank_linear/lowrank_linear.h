// The native kernels of lowrank_linear and hadamard_linear: y = x (Φ ⊙ W)ᵀ + b + scaling · (Σ(x) x Vᵀ) Uᵀ and its
// gradients; Φ = 1 for lowrank_linear.
//
// Symbols as in tarp_kernels/ops/lowrank_linear: T rows, K in, N out, r rank, S generator outputs (r or r²), m width of
// an MLP generator's hidden layer, B tasks. Everything is a raw pointer into memory that the caller keeps alive;
// adapter tensors are contiguous float32, with a leading task dimension where there are segments.
#pragma once

#include <stdint.h>

#include "built_isas.h"
#include "common/factor.h"

namespace tarp {

enum class Activation { none, one_plus, sigmoid, tanh, softplus, relu, gelu, silu };

struct LowrankLinear {
    int64_t rows, in, out, rank;
    int64_t first;    // rows of w1: S of a linear generator, m of an MLP, 0 without generator
    int64_t outputs;  // S, 0 without generator
    int64_t tasks;    // B, or 0 without segments
    const int64_t* segments;
    bool bf16;  // dtype of x, weight, bias, y, dy, dx
    const char* x;
    int64_t x_row;  // elements from row to row
    const char* weight;
    int64_t weight_row, weight_column;
    const float *V, *U, *w1, *b1, *w2, *b2;
    bool full;  // Σ(x) is a full matrix
    Activation hidden_activation, activation;
    float scaling;
    uint64_t drop_threshold, drop_seed;
    int threads;
    Factor factor;  // of task 0; W becomes Φ ⊙ W
    // The call's row i is row x_index[i] of x and dx, and row y_index[i] of y and dy; strictly rising; null: row i. All
    // that is counted by row (segments, dropout, h, s, u) counts the call's rows. Null with a factor.
    const int64_t *x_index, *y_index;
};

struct LowrankLinearForward {
    const char* bias;
    char* y;           // [T, N], or more rows with an index
    float *h, *s, *u;  // saved for backward: [T, r], [T, S], [T, m]; null when there will be none
    float* z;          // workspace [T, r]
};

struct LowrankLinearBackward {
    const char* dy;
    int64_t dy_row;
    const float *h, *s, *u;
    char* dx;  // null where no gradient is asked for, likewise:
    float *dV, *dU, *dw1, *db1, *dw2, *db2, *dP, *dQ;
    float* dW;         // [N, K], zeros before; only with a factor, whose Φ it is multiplied by
    float* workspace;  // backward_workspace() floats
};

int64_t backward_workspace(const LowrankLinear& op);
void lowrank_linear_forward(const LowrankLinear& op, const LowrankLinearForward& io);
void lowrank_linear_backward(const LowrankLinear& op, const LowrankLinearBackward& io);

#define TARP_DECLARE(isa)                                                                   \
    namespace isa {                                                                         \
    void lowrank_linear_forward(const LowrankLinear& op, const LowrankLinearForward& io);   \
    void lowrank_linear_backward(const LowrankLinear& op, const LowrankLinearBackward& io); \
    }
TARP_BUILT_ISAS(TARP_DECLARE)
#undef TARP_DECLARE

}  // namespace tarp
