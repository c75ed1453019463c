// What flows back into the multiplicative term's P and Q, and into W. The product dyᵀ x is made tile by tile and never
// held.
#pragma once

#include "common/products.h"

namespace tarp {
namespace TARP_ISA {

// What unit `unit` adds to the gradients of P, Q and W: with D = dyᵀ x over rows [row, row + rows) of dy [.., N] and
// x [.., K], tile by tile, and G = D ⊙ W ⊙ f'(P Q), dP [N, R] += G Qᵀ over the unit's columns, dQ [R, width] of its
// block += Pᵀ G there, and where there is one dW [N, K] += D ⊙ f(P Q). dP and dQ may both be null.
inline void factor_gradients(const Factor& factor, int64_t unit, const Operand& x, const Operand& dy, int64_t row,
                             int64_t rows, const Operand& weight, float* dP, float* dQ, float* dW, Scratch& scratch) {
    static const float zeros[kColumns] = {};
    const int64_t width = factor.width(), size = factor.unit(), per_block = factor.units_of_block();
    const int64_t block = unit / per_block, begin = unit % per_block * size, end = smaller(begin + size, width);
    const int64_t panels = (end - begin + kColumns - 1) / kColumns, R = factor.rank;
    float* left = scratch.floats(rows * kRows + panels * (rows + R) * kColumns + (2 * kColumns + R) * kRows);
    float* right = left + rows * kRows;
    float* Q = right + panels * rows * kColumns;
    float *G = Q + panels * R * kColumns, *factors = G + kRows * kColumns, *sums = factors + kRows * kColumns;
    const Operand own{x.at(row, block * width), x.row, x.column, x.bf16};
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = begin + p * kColumns, some = smaller(kColumns, end - column);
        pack(own, rows, column, some, right + p * rows * kColumns);
        pack_Q(factor, column, some, Q + p * R * kColumns);
    }
    for (int64_t n = 0; n < factor.out; n += kRows) {
        const int64_t count = smaller(kRows, factor.out - n);
        const float* P = factor.P + (block * factor.out + n) * R;
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t i = 0; i < count; ++i) left[t * kRows + i] = dy.value(row + t, n + i);
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t column = begin + p * kColumns, some = smaller(kColumns, end - column);
            const float* q = Q + p * R * kColumns;
            outer_rows<FloatStep>(count, rows, reinterpret_cast<const char*>(left), int64_t{4}, int64_t{kRows * 4},
                                  static_cast<const float*>(right + p * rows * kColumns), int64_t{kColumns},
                                  static_cast<const float*>(zeros), int64_t{0}, G, int64_t{kColumns});
            if (dW != nullptr) {
                factor_tile(factor, block, n, count, q, false, factors);
                for (int64_t i = 0; i < count; ++i) {
                    float* out = dW + (n + i) * factor.in + block * width + column;
                    for (int64_t j = 0; j < some; ++j) out[j] += factors[i * kColumns + j] * G[i * kColumns + j];
                }
            }
            if (dP == nullptr) continue;
            factor_tile(factor, block, n, count, q, true, factors);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < some; ++j)
                    G[i * kColumns + j] *= factors[i * kColumns + j] * weight.value(n + i, block * width + column + j);
            skinny(count, R, some, G, kColumns, q, kColumns, sums, R);
            for (int64_t i = 0; i < count * R; ++i) dP[n * R + i] += sums[i];
            for (int64_t r = 0; r < R; ++r) {
                float* out = dQ + r * width + column;
                for (int64_t i = 0; i < count; ++i) {
                    const float share_of_row = P[i * R + r];
                    for (int64_t j = 0; j < some; ++j) out[j] += share_of_row * G[i * kColumns + j];
                }
            }
        }
    }
}

}  // namespace TARP_ISA
}  // namespace tarp
