// z = scaling · Σ(x) h for rows of x, by one block, from the sums h = x Vᵀ and x w1ᵀ.
#pragma once

#include "common/cuda/activations.cuh"
#include "lowrank_linear/adapter_cuda.cuh"

namespace tarp {
namespace cuda {

template <class Element>
struct Middle {
    Adapter<Element> b1, w2, b2;
    float *h, *s, *u;  // of the first row; null where backward needs none, or where another block keeps them

    // sum(i, j): column j of row i of [h, x w1ᵀ]. task(i): the row's. z(i · r + j, value) takes z [rows, r]. hidden
    // [rows, first] is scratch of an MLP generator in shared memory. All threads; Form: that of a kernel.
    template <class Form, class Sum, class Task, class Take>
    __device__ __forceinline__ void make(const Form& form, int rows, float scaling, const Sum& sum, const Task& task,
                                         float* hidden, const Take& z) const {
        const bool mlp = w2.data != nullptr;
        if (mlp) {
            for (int i = threadIdx.x; i < rows * form.first; i += blockDim.x) {
                const int token = i / form.first, which = i % form.first;
                const float unit =
                    sum(token, form.rank + which) + b1[static_cast<int64_t>(task(token)) * form.first + which];
                if (u != nullptr) u[i] = unit;
                hidden[i] = activate(form.hidden_activation, unit);
            }
            __syncthreads();  // the activated units are there
        }
        for (int i = threadIdx.x; i < rows * form.rank; i += blockDim.x) {
            const int token = i / form.rank, which = i % form.rank;
            const float own = sum(token, which);
            float value = 0;
            for (int step = 0; step < (form.full ? form.rank : 1); ++step) {
                // Neighbours start at different columns: at the same one their numbers of Σ are r apart, in few banks.
                const int j = which + step < form.rank ? which + step : which + step - form.rank;
                const int output = form.full ? which * form.rank + j : which;
                float scale = 1;
                if (form.first > 0) {
                    const int64_t at = static_cast<int64_t>(task(token)) * form.outputs + output;
                    float g = b2[at];
                    if (mlp) {
                        for (int unit = 0; unit < form.first; ++unit)
                            g += w2[at * form.first + unit] * hidden[token * form.first + unit];
                    } else {
                        g = sum(token, form.rank + output) + b1[at];
                    }
                    const bool beside = form.full && form.activation == kOnePlus && which != j;  // I + g
                    scale = beside ? g : activate(form.activation, g);
                    if (s != nullptr) s[static_cast<int64_t>(token) * form.outputs + output] = scale;
                }
                value += scale * (step == 0 ? own : sum(token, j));
            }
            if (h != nullptr) h[i] = own;
            z(i, scaling * value);
        }
    }
};

}  // namespace cuda
}  // namespace tarp
