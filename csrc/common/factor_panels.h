// The multiplicative term, made a few rows at a time while panels of W are packed: no matrix of W's size is ever held.
#pragma once

#include "common/factor.h"
#include "common/pack.h"
#include "common/scratch.h"

namespace tarp {
namespace TARP_ISA {

constexpr float kCentre = 0.54132485f;  // ln(e - 1): softplus is 1 there

// e^v for v ≤ 0 by the polynomial of Cephes' expf (Moshier 1989), written so that compilers map it to vectors.
TARP_INLINE float exp_negative(float v) {
    v = v < -87.0f ? -87.0f : v;
    const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (p * r * r + r + 1.0f) * power;
}

// ln(1 + t) for 0 ≤ t ≤ 1 as 2 artanh(t / (2 + t)), whose series ends at 2⁻²⁹ after eight terms.
TARP_INLINE float log_one_plus(float t) {
    const float z = t / (2.0f + t), w = z * z;
    float p = 1.0f / 15;
    p = p * w + 1.0f / 13;
    p = p * w + 1.0f / 11;
    p = p * w + 1.0f / 9;
    p = p * w + 1.0f / 7;
    p = p * w + 1.0f / 5;
    p = p * w + 1.0f / 3;
    return 2.0f * z * (p * w + 1.0f);
}

TARP_INLINE float softplus(float v) {
    return (v > 0 ? v : 0) + log_one_plus(exp_negative(v > 0 ? -v : v));
}

TARP_INLINE float sigmoid(float v) {
    const float e = exp_negative(v > 0 ? -v : v), slope = 1.0f / (1.0f + e);
    return v > 0 ? slope : e * slope;
}

// arguments [count] become f of them, or its derivative there.
inline void factors(FactorActivation activation, bool slope, float* arguments, int64_t count) {
    if (activation == FactorActivation::one_plus) {
        for (int64_t i = 0; i < count; ++i) arguments[i] = slope ? 1.0f : 1.0f + arguments[i];
        return;
    }
    const float centre = activation == FactorActivation::centred_softplus ? kCentre : 0.0f;
    if (slope)
        for (int64_t i = 0; i < count; ++i) arguments[i] = sigmoid(arguments[i] + centre);
    else
        for (int64_t i = 0; i < count; ++i) arguments[i] = softplus(arguments[i] + centre);
}

// f(P Q), or f'(P Q), for `rows` outputs from `row` on and the columns whose Q lies packed in `right` [R][kColumns].
inline void factor_tile(const Factor& factor, int64_t block, int64_t row, int64_t rows, const float* right, bool slope,
                        float* tile) {
    static const float zeros[kColumns] = {};
    const float* P = factor.P + (block * factor.out + row) * factor.rank;
    outer_rows<FloatStep>(rows, factor.rank, reinterpret_cast<const char*>(P), factor.rank * 4, int64_t{4}, right,
                          int64_t{kColumns}, zeros, int64_t{0}, tile, int64_t{kColumns});
    factors(factor.activation, slope, tile, rows * kColumns);
}

// Columns [column, column + count) of one block's Q as a panel [R][kColumns], zeros beyond.
inline void pack_Q(const Factor& factor, int64_t column, int64_t count, float* right) {
    const Operand Q{reinterpret_cast<const char*>(factor.Q), factor.width(), 1, false};
    pack(Q, factor.rank, column, count, right);
}

// panel [N][kColumns] of W, some columns of K from `column` on: times Φ.
inline void weigh_inputs(const Factor& factor, int64_t column, int64_t some, float* panel, Scratch& scratch) {
    const int64_t width = factor.width();
    float* right = scratch.floats((factor.rank + kRows) * kColumns);
    float* tile = right + factor.rank * kColumns;
    for (int64_t first = 0; first < some;) {
        const int64_t block = (column + first) / width, begin = (column + first) % width;
        const int64_t run = smaller(some - first, width - begin);
        pack_Q(factor, begin, run, right);
        for (int64_t n = 0; n < factor.out; n += kRows) {
            const int64_t rows = smaller(kRows, factor.out - n);
            factor_tile(factor, block, n, rows, right, false, tile);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < run; ++j) panel[(n + i) * kColumns + first + j] *= tile[i * kColumns + j];
        }
        first += run;
    }
}

// panel [K][kColumns] of Wᵀ, some columns of N from `column` on: times Φᵀ.
inline void weigh_outputs(const Factor& factor, int64_t column, int64_t some, float* panel, Scratch& scratch) {
    static const float zeros[kColumns] = {};
    const int64_t width = factor.width();
    float* right = scratch.floats((factor.rank + kRows) * kColumns);
    float* tile = right + factor.rank * kColumns;
    for (int64_t block = 0; block < factor.blocks; ++block) {
        const Operand P{reinterpret_cast<const char*>(factor.P + block * factor.out * factor.rank), 1, factor.rank,
                        false};  // [R, N]
        pack(P, factor.rank, column, some, right);
        for (int64_t k = 0; k < width; k += kRows) {
            const int64_t rows = smaller(kRows, width - k);
            outer_rows<FloatStep>(rows, factor.rank, reinterpret_cast<const char*>(factor.Q + k), int64_t{4}, width * 4,
                                  static_cast<const float*>(right), int64_t{kColumns}, static_cast<const float*>(zeros),
                                  int64_t{0}, tile, int64_t{kColumns});
            factors(factor.activation, false, tile, rows * kColumns);
            float* target = panel + (block * width + k) * kColumns;
            for (int64_t i = 0; i < rows * kColumns; ++i) target[i] *= tile[i];
        }
    }
}

// A packed panel of W (or, for `outputs`, of Wᵀ), some columns from `column` on: times Φ.
inline void weigh(const Factor& factor, bool outputs, int64_t column, int64_t some, float* panel) {
    static thread_local Scratch scratch;
    (outputs ? weigh_outputs : weigh_inputs)(factor, column, some, panel, scratch);
}

}  // namespace TARP_ISA
}  // namespace tarp
