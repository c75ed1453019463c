// z = scaling · Σ(x) h for every row of x, by one block, from the sums h = x Vᵀ and x w1ᵀ in `middle` [T, r + first].
#pragma once

#include "common/cuda/activations.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"

namespace tarp {
namespace cuda {

// A tensor of the adapter: float32 or Element, or none, which reads as zeros.
template <class Element>
struct Adapter {
    const void* data;
    bool wide;

    __device__ __forceinline__ float operator[](int64_t i) const {
        if (data == nullptr) return 0;
        return wide ? static_cast<const float*>(data)[i] : widen(static_cast<const Element*>(data)[i]);
    }
};

template <class Element>
struct Middle {
    Adapter<Element> b1, w2, b2;
    const float* sums;  // [T, r + first], written by other blocks
    float *h, *s, *u;   // null where backward needs none, or where another block keeps them

    // z [T, r] for tasks[token]; hidden [T, first] is scratch of an MLP generator. Both are shared memory. All threads.
    __device__ __forceinline__ void make(const FewRowsForm& form, float scaling, const int* tasks, float* hidden,
                                         float* z) const {
        const int stacked = form.rank + form.first;
        const bool mlp = w2.data != nullptr;
        if (mlp) {
            for (int i = threadIdx.x; i < form.rows * form.first; i += blockDim.x) {
                const int token = i / form.first, which = i % form.first;
                const float unit = load_from_second_level(sums + token * stacked + form.rank + which) +
                                   b1[static_cast<int64_t>(tasks[token]) * form.first + which];
                if (u != nullptr) u[i] = unit;
                hidden[i] = activate(form.hidden_activation, unit);
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < form.rows * form.rank; i += blockDim.x) {
            const int token = i / form.rank, which = i % form.rank;
            const float* own = sums + token * stacked;
            const int begin = form.full ? 0 : which, end = form.full ? form.rank : which + 1;
            float value = 0;
            for (int j = begin; j < end; ++j) {
                const int output = form.full ? which * form.rank + j : which;
                float scale = 1;
                if (form.first > 0) {
                    const int64_t at = static_cast<int64_t>(tasks[token]) * form.outputs + output;
                    float g = b2[at];
                    if (mlp) {
                        for (int unit = 0; unit < form.first; ++unit)
                            g += w2[at * form.first + unit] * hidden[token * form.first + unit];
                    } else {
                        g = load_from_second_level(own + form.rank + output) + b1[at];
                    }
                    const bool beside = form.full && form.activation == kOnePlus && which != j;  // I + g
                    scale = beside ? g : activate(form.activation, g);
                    if (s != nullptr) s[token * form.outputs + output] = scale;
                }
                value += scale * load_from_second_level(own + j);
            }
            if (h != nullptr) h[i] = load_from_second_level(own + which);
            z[i] = scaling * value;
        }
    }
};

}  // namespace cuda
}  // namespace tarp
