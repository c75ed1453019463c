// What the CUDA kernels of search_cell share: from h to the nodes of a window, and from sums to rows of out.
//
// A block makes all of a cell for its window of 64 rows, of which it owns the middle: the rows in front and behind are
// what convolutions of the owned ones see, and are made by the neighbours too. Rows are never multiplied with what they
// do not see: a convolution's tap reads a row of zeros in its place.
#pragma once

#include "common/cuda/activations.cuh"
#include "search_cell/search_cell_cuda.h"
#include "search_cell/steps_cuda.cuh"

namespace tarp {
namespace cuda {
namespace cell {

// LayerNorm of the rows whose pieces a thread copies: two, 32 apart; eight threads share them.
template <class Element>
struct Norm {
    float mean[2], scale[2];

    // From h itself: a mean, then the squares about it.
    __device__ __forceinline__ void measure(const Element* h, const Window& window, const CellForm& form) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = window.first + static_cast<int>(threadIdx.x) / 8 + i * 32;
            const bool there = token >= 0 && token < form.tokens;
            const Element* row = h + static_cast<int64_t>(there ? token : 0) * form.d;
            const auto sum = [&](auto function) {
                float total = 0;
                for (int k = threadIdx.x % 8 * 8; k < form.d; k += 64) {
                    const uint4 piece = *reinterpret_cast<const uint4*>(row + k);
                    const Element* numbers = reinterpret_cast<const Element*>(&piece);
#pragma unroll
                    for (int j = 0; j < 8; ++j) total += function(widen(numbers[j]));
                }
                return sum_over_lanes<8>(total);
            };
            const float m = sum([](float v) { return v; }) / form.d;
            mean[i] = m;
            scale[i] = rsqrtf(sum([m](float v) { return (v - m) * (v - m); }) / form.d + form.eps);
        }
    }

    // Of the pieces of a tile that this thread copied, columns from `column0` on.
    __device__ __forceinline__ void apply(Element* tile, const void* norm, const void* norm_bias, int64_t task_at,
                                          int column0, const CellForm& form) const {
        const int column = threadIdx.x % 8 * 8;
        if (column0 + column >= form.d) return;
        float factor[8], shift[8];
        eight_numbers<Element>(factor, norm, task_at + column0 + column, form.wide);
        eight_numbers<Element>(shift, norm_bias, task_at + column0 + column, form.wide);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint4* at = reinterpret_cast<uint4*>(tile + place(threadIdx.x / 8 + i * 32, column));
            uint4 piece = *at;
            Element* numbers = reinterpret_cast<Element*>(&piece);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                numbers[j] = narrow<Element>((widen(numbers[j]) - mean[i]) * (scale[i] * factor[j]) + shift[j]);
            *at = piece;
        }
    }
};

// s0 and s1 before their relu, without their bias. `stages`: of three tiles each, in `memory`.
template <class Element>
__device__ __forceinline__ void project(Sums (&sums)[2], const Element* h, const void* norm, const void* norm_bias,
                                        const Element* weight, const Window& window, const CellForm& form,
                                        Element* memory, int stages) {
    Norm<Element> of_rows;
    if (norm != nullptr) of_rows.measure(h, window, form);
    const Element* from = h + static_cast<int64_t>(window.first) * form.d;
    const int64_t size = static_cast<int64_t>(form.width) * form.d;
    const int task = form.per_task ? window.task : 0;
    const Element* own = weight + task * 2 * size;
    sums[0].fill(0), sums[1].fill(0);
    pipeline((form.d + kWidth - 1) / kWidth, stages,
             [&](int n, int stage) {
                 Element* tile = memory + stage * 3 * kTile;
                 const int k = n * kWidth;
                 fetch(tile, from + k, form.d, max(0, -window.first), min(kRows, form.tokens - window.first),
                       form.d - k, h);
                 fetch(tile + kTile, own + k, form.d, 0, form.width, form.d - k, own);
                 fetch(tile + 2 * kTile, own + size + k, form.d, 0, form.width, form.d - k, own);
             },
             [&](int n, int stage) {
                 Element* tile = memory + stage * 3 * kTile;
                 if (norm != nullptr) {
                     of_rows.apply(tile, norm, norm_bias, static_cast<int64_t>(task) * form.d, n * kWidth, form);
                     __syncthreads();  // all rows are normed
                 }
                 const LeftRows<Element> rows = rows_of(tile);
                 multiply<Element, true>(sums[0], rows, tile + kTile);
                 multiply<Element, true>(sums[1], rows, tile + 2 * kTile);
             });
}

// s0 and s1 as nodes.
template <class Element>
__device__ __forceinline__ void keep_inputs(Sums (&sums)[2], const void* bias, int task, const CellForm& form,
                                            Element* nodes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = static_cast<int64_t>(2 * task + i) * form.width;
        sums[i].add_to_columns(
            [&](int column) { return column < form.width ? number<Element>(bias, at + column, form.wide) : 0.0f; });
        sums[i].each(
            [](int, int, float& first, float& second) { first = fmaxf(first, 0.0f), second = fmaxf(second, 0.0f); });
        put(nodes + i * kTile, sums[i]);
    }
}

// The weights of a cell on their way through `ring`, one product after the other: use(step, its tile).
template <class Element, class Use>
__device__ __forceinline__ void each_step(const uint16_t* steps, int count, const Edges<Element>& edges, Element* ring,
                                          int stages, Use use) {
    pipeline(
        count, stages,
        [&](int n, int stage) {
            const Element* matrix = edges.matrix(Step::of(steps[n]));
            fetch(ring + stage * kTile, matrix, edges.width, 0, edges.width, edges.width, matrix);
        },
        [&](int n, int stage) { use(Step::of(steps[n]), ring + stage * kTile); });
}

// sum += one tap of a map's input; after the last tap with the bias.
template <class Element>
__device__ __forceinline__ bool affine(Sums& sum, const Step& step, const Element* tile, const Element* source,
                                       const Edges<Element>& edges, const Places& places, const Element* zeros,
                                       int causal) {
    if (step.tap == 0) sum.fill(0);
    multiply<Element, true>(sum, places.shifted(source, step.shift(causal), zeros), tile);
    if (step.tap < step.taps() - 1) return false;
    sum.add_to_columns([&](int column) { return edges.bias(step.edge, step.map, column); });
    return true;
}

// The nodes from n0 to `last`, the last one left in `total`; s0 and s1 are there for the threads that made them, and
// the first product waits for those of others.
template <class Element>
__device__ __forceinline__ void make_nodes(int last, Sums& total, const uint16_t* steps, int count, const float* alpha,
                                           const Edges<Element>& edges, const Places& places, Element* nodes,
                                           Element* ring, const Element* zeros, const CellForm& form) {
    Sums product, value;
    int node = 2;
    const auto begin_node = [&]() {
        total.fill(0);
        for (int edge = first_edge(node); edge < first_edge(node) + node; ++edge) {
            const float a = alpha[edge * kOperations + 1];
            if (a != 0) add(total, a, nodes + source_of(edge) * kTile);
        }
    };
    const auto end_node = [&]() {
        put(nodes + node++ * kTile, total);
        __syncthreads();  // the node is there
    };
    begin_node();
    each_step(steps, count, edges, ring, form.stages, [&](const Step& step, const Element* tile) {
        for (; step.edge >= first_edge(node) + node; begin_node()) end_node();
        const Element* source = nodes + source_of(step.edge) * kTile;
        if (!affine(product, step, tile, source, edges, places, zeros, form.causal)) return;
        const float a = alpha[step.edge * kOperations + operation_of(step.map)];
        if (step.map == 1) {
            value = product;
        } else if (step.map == 2) {
            product.with(value, [](float& gate, float of) { gate = of * sigmoid(gate); });
            total.with(product, [a](float& sum, float made) { sum += a * made; });
        } else {
            total.with(product, [a](float& sum, float made) { sum += a * fmaxf(made, 0.0f); });
        }
    });
    for (; node < last; begin_node()) end_node();
}

constexpr int kOutRow = kWidth + 8;  // floats of a row on its way out: rows start eight banks apart
constexpr int kOutBytes = kRows * kOutRow * 4;

// Two pieces of eight numbers a thread, rows 32 apart, of what is added to the owned rows on their way out.
struct Pieces {
    uint4 at[2];

    template <class Element>
    __device__ __forceinline__ void load(const Element* rows, int column0, const Window& window, int d) {
        const int column = column0 + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = window.first + static_cast<int>(threadIdx.x) / 8 + i * 32;
            at[i] = make_uint4(0, 0, 0, 0);
            if (token >= window.begin && token < window.end && column < d)
                at[i] = *reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(token) * d + column);
        }
    }

    // out = these + sums + bias for 64 columns, rounded once, through `staged`. Whoever writes there next waits first.
    // bias: from number `bias_at` on, or null.
    template <class Element>
    __device__ __forceinline__ void write(Sums& sums, float* staged, const void* bias, int64_t bias_at, int wide,
                                          Element* out, int column0, const Window& window, int d) const {
        sums.each([&](int row, int column, float& first, float& second) {
            *reinterpret_cast<float2*>(staged + row * kOutRow + column) = make_float2(first, second);
        });
        __syncthreads();  // the sums are there
        const int piece = threadIdx.x % 8, column = column0 + piece * 8, turn = piece / 4;
        if (column >= d) return;
        float shift[8] = {};
        if (bias != nullptr) eight_numbers<Element>(shift, bias, bias_at + column, wide);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = threadIdx.x / 8 + i * 32, token = window.first + row;
            if (token < window.begin || token >= window.end) continue;
            const float4* from = reinterpret_cast<const float4*>(staged + row * kOutRow + piece * 8);
            float4 half[2] = {from[turn], from[1 - turn]};  // the upper four first: eight threads, 32 banks
            if (turn) {
                const float4 upper = half[0];
                half[0] = half[1], half[1] = upper;
            }
            const float* made = reinterpret_cast<const float*>(half);
            const Element* added = reinterpret_cast<const Element*>(&at[i]);
            uint4 result;
            Element* numbers = reinterpret_cast<Element*>(&result);
#pragma unroll
            for (int j = 0; j < 8; ++j) numbers[j] = narrow<Element>(widen(added[j]) + made[j] + shift[j]);
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * d + column) = result;
        }
    }
};

}  // namespace cell
}  // namespace cuda
}  // namespace tarp
