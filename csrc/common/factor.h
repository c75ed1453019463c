// The multiplicative term Φ = f(P Q) of one task.
#pragma once

#include <stdint.h>

namespace tarp {

enum class FactorActivation { centred_softplus, one_plus, softplus };

// P [C, N, R] and Q [R, K / C]: column block c of Φ [N, K] is f(P[c] Q). C = 1 for a plain low-rank argument; a sum of
// Kronecker products is one with as many blocks as its left factors have columns.
struct Factor {
    const float *P, *Q;  // null: no factor
    int64_t rank, blocks, out, in;
    FactorActivation activation;

    int64_t width() const { return in / blocks; }
    int64_t P_size() const { return blocks * out * rank; }
    int64_t Q_size() const { return rank * width(); }

    // Columns of Φ that one thread takes at a time for the gradients. Sums over columns end with a unit, so that their
    // order never depends on threads; the partial sums of P's gradient then take at most 3 % of W.
    int64_t unit() const {
        const int64_t least = (32 * rank + 63) / 64 * 64;
        return least < 256 ? 256 : least;
    }
    int64_t units_of_block() const { return (width() + unit() - 1) / unit(); }
    int64_t units() const { return blocks * units_of_block(); }

    Factor of_task(int64_t task) const {
        Factor own = *this;
        own.P += task * P_size();
        own.Q += task * Q_size();
        return own;
    }
};

}  // namespace tarp
