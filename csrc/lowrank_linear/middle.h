// What happens between V and U, row by row in float: z = Σ(x) h with s = g(x), and its derivative.
#pragma once

#include <math.h>

#include "lowrank_linear/lowrank_linear.h"

namespace tarp {
namespace TARP_ISA {

inline float activate(Activation activation, float v) {
    switch (activation) {
        case Activation::one_plus:
            return 1 + v;
        case Activation::sigmoid:
            return 1 / (1 + expf(-v));
        case Activation::tanh:
            return tanhf(v);
        case Activation::softplus:
            return v > 20 ? v : log1pf(expf(v));
        case Activation::relu:
            return v > 0 ? v : 0;
        case Activation::gelu:
            return 0.5f * v * (1 + erff(v * 0.70710678f));
        case Activation::silu:
            return v / (1 + expf(-v));
        default:
            return v;
    }
}

// Derivative of an output activation, from its value s.
inline float output_slope(Activation activation, float s) {
    switch (activation) {
        case Activation::sigmoid:
            return s * (1 - s);
        case Activation::tanh:
            return 1 - s * s;
        case Activation::softplus:
            return -expm1f(-s);
        default:
            return 1;
    }
}

// Derivative of a hidden activation, from its argument u.
inline float hidden_slope(Activation activation, float u) {
    switch (activation) {
        case Activation::relu:
            return u > 0 ? 1 : 0;
        case Activation::tanh: {
            const float t = tanhf(u);
            return 1 - t * t;
        }
        case Activation::silu: {
            const float gate = 1 / (1 + expf(-u));
            return gate * (1 + u * (1 - gate));
        }
        default:  // gelu: Φ(u) + u φ(u)
            return 0.5f * (1 + erff(u * 0.70710678f)) + u * 0.39894228f * expf(-0.5f * u * u);
    }
}

// One task's share of the generator's tensors.
struct Adapter {
    const float *V, *U, *w1, *b1, *w2, *b2;

    static inline const float* offset(const float* p, int64_t count) { return p == nullptr ? nullptr : p + count; }

    Adapter(const LowrankLinear& op, int64_t task)
        : V(op.V + task * op.rank * op.in),
          U(op.U + task * op.out * op.rank),
          w1(offset(op.w1, task * op.first * op.in)),
          b1(offset(op.b1, task * op.first)),
          w2(offset(op.w2, task * op.outputs * op.first)),
          b2(offset(op.b2, task * op.outputs)) {}
};

// s from u = w1 x + b1 for one row: u [first] -> s [outputs].
inline void generate(const LowrankLinear& op, const Adapter& adapter, const float* u, float* s) {
    for (int64_t i = 0; i < op.outputs; ++i) {
        float g = adapter.b2 == nullptr ? 0 : adapter.b2[i];
        if (adapter.w2 == nullptr)
            g = u[i];
        else
            for (int64_t j = 0; j < op.first; ++j)
                g += adapter.w2[i * op.first + j] * activate(op.hidden_activation, u[j]);
        if (op.full && op.activation == Activation::one_plus)
            s[i] = g + (i % (op.rank + 1) == 0 ? 1 : 0);  // the diagonal of an r x r matrix
        else
            s[i] = activate(op.activation, g);
    }
}

// z = scaling · Σ h for one row.
inline void apply_middle(const LowrankLinear& op, const float* h, const float* s, float* z) {
    for (int64_t i = 0; i < op.rank; ++i) {
        float value = h[i];
        if (op.outputs != 0 && !op.full) value *= s[i];
        if (op.outputs != 0 && op.full) {
            value = 0;
            for (int64_t j = 0; j < op.rank; ++j) value += s[i * op.rank + j] * h[j];
        }
        z[i] = op.scaling * value;
    }
}

// From dz [r] (scaling included): dh [r] and dg [outputs], the gradient of the generator before its activation.
inline void middle_backward(const LowrankLinear& op, const float* h, const float* s, const float* dz, float* dh,
                            float* dg) {
    if (op.outputs == 0) {
        for (int64_t i = 0; i < op.rank; ++i) dh[i] = dz[i];
        return;
    }
    if (!op.full) {
        for (int64_t i = 0; i < op.rank; ++i) {
            dh[i] = s[i] * dz[i];
            dg[i] = h[i] * dz[i] * output_slope(op.activation, s[i]);
        }
        return;
    }
    for (int64_t j = 0; j < op.rank; ++j) dh[j] = 0;
    for (int64_t i = 0; i < op.rank; ++i) {
        for (int64_t j = 0; j < op.rank; ++j) {
            const int64_t ij = i * op.rank + j;
            dh[j] += s[ij] * dz[i];
            dg[ij] = dz[i] * h[j] * output_slope(op.activation, s[ij]);
        }
    }
}

}  // namespace TARP_ISA
}  // namespace tarp
