// The gradients of the edges' weights, in two launches: every block adds up one map's products over a chunk of rows,
// for all of its taps at once; then the chunks of a task are added in their order. No atomics: the same bits on every
// call.
//
// A token and a map cost 2 C C taps operations and 4 C bytes, which are read once: so C · taps / 2 operations a byte,
// 32 to 160 at C = 64, and the bytes bind for all but conv5. A chunk's part is 4 C C taps bytes, written and read:
// beside the 512 rows of a chunk a quarter of their bytes for one tap, 1.25 times as many for the five of conv5.
#pragma once

#include "search_cell/search_cell_cuda.h"
#include "search_cell/steps_cuda.cuh"

namespace tarp {
namespace cuda {

namespace cell {

constexpr int kReach = 4;                      // rows that a tap sees beyond its own, at most
constexpr int kSeenRows = kRows + 2 * kReach;  // of a map's input, for 64 rows of what flows back
constexpr int kGradientStages = 4, kGradientStage = kTile + kSeenRows * kWidth;

struct GradientRows {
    const int *positions, *lengths;
    int begin, end;
};

// part = flowᵀ · what each tap sees of `source`, and flow's sums, over rows [begin, end).
template <int kTaps, class Element>
__device__ __forceinline__ void sum_products(const Element* flow, const Element* source, const GradientRows& rows,
                                             float* part, Element* memory, int2 (*limits)[kRows], const Element* zeros,
                                             const CellForm& form) {
    Sums sums[kTaps];
    float column_sums[2][4] = {};  // of flow, as the first column of a product with ones
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) sums[tap].fill(0);
    const int lane = threadIdx.x % 32;
    const uint32_t one = lane / 4 == 0 ? pair(narrow<Element>(1), narrow<Element>(1)) : 0;
    pipeline((rows.end - rows.begin + kRows - 1) / kRows, kGradientStages,
             [&](int n, int stage) {
                 Element* tile = memory + stage * kGradientStage;
                 const int first = rows.begin + n * kRows, above = first - kReach;
                 const int64_t at = static_cast<int64_t>(first) * form.width;
                 fetch(tile, flow + at, form.width, 0, rows.end - first, form.width, flow);
                 fetch<kSeenRows>(tile + kTile, source + at - kReach * form.width, form.width, max(0, -above),
                                  form.tokens - above, form.width, source);
                 if (threadIdx.x < kRows) {  // which shifts a row may see
                     const int token = first + static_cast<int>(threadIdx.x);
                     const int position = token < rows.end ? rows.positions[token] : 0;
                     limits[stage][threadIdx.x] =
                         make_int2(-position, token < rows.end ? rows.lengths[token] - position : -position);
                 }
             },
             [&](int, int stage) {
                 const Element *g = memory + stage * kGradientStage, *x = g + kTile;
#pragma unroll 1
                 for (int k = 0; k < kRows; k += 16) {
                     uint32_t left[2][4];  // columns g, g + 8 of flow, of rows k, then of k + 8
#pragma unroll
                     for (int m = 0; m < 2; ++m)
                         load_4_matrices_transposed(
                             left[m], g + place(k + lane / 16 * 8 + lane % 8, warp_row() + m * 16 + lane / 8 % 2 * 8));
                     const int2 seen = limits[stage][k + lane % 16];
#pragma unroll
                     for (int tap = 0; tap < kTaps; ++tap) {
                         const int shift = form.causal ? tap + 1 - kTaps : tap - kTaps / 2;
                         const int at = place(k + lane % 16 + kReach + shift, warp_column() + lane / 16 * 8);
                         // zeros of the same banks
                         const Element* from = shift >= seen.x && shift < seen.y ? x + at : zeros + at % kWidth;
                         uint32_t right[4];
                         load_4_matrices_transposed(right, from);
#pragma unroll
                         for (int m = 0; m < 2; ++m)
#pragma unroll
                             for (int n = 0; n < 2; ++n)
                                 multiply_16x8x16<Element>(sums[tap].at[m][n], left[m], right[n * 2], right[n * 2 + 1]);
                     }
#pragma unroll
                     for (int m = 0; m < 2; ++m) multiply_16x8x16<Element>(column_sums[m], left[m], one, one);
                 }
             });
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
        sums[tap].each([&](int row, int column, float& first, float& second) {
            if (row < form.width && column < form.width)
                *reinterpret_cast<float2*>(part + (tap * form.width + row) * kWidth + column) =
                    make_float2(first, second);
        });
    if (warp_column() == 0 && lane % 4 == 0)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row() + m * 16 + lane / 4 + half * 8;
                if (row < form.width) part[kTaps * form.width * kWidth + row] = column_sums[m][half * 2];
            }
}

}  // namespace cell

// flow [slots, T, C], nodes [4, T, C] and slots [9, 5] of the backward kernel; chunks as windows;
// parts [chunks, slots, size]: a
// map's matrices with rows of 64, then its bias. A block for each chunk and slot.
template <class Element>
__global__ void __launch_bounds__(cell::kThreads)
    search_cell_gradients_kernel(const Element* flow, const Element* nodes, const int* positions, const int* lengths,
                                 const int4* chunks, const int* slots, float* parts, int size, const CellForm form) {
    using namespace cell;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(128) Element zeros[kWidth];
    __shared__ int2 limits[kGradientStages][kRows];
    __shared__ int found;
    if (threadIdx.x < kWidth) zeros[threadIdx.x] = narrow<Element>(0);
    if (threadIdx.x < kEdges * kMaps && slots[threadIdx.x] == static_cast<int>(blockIdx.y)) found = threadIdx.x;
    __syncthreads();  // the slot's edge and map are found
    const int edge = found / kMaps, map = found % kMaps;
    const int64_t array = static_cast<int64_t>(form.tokens) * form.width;
    const int4 own = chunks[blockIdx.x];
    const GradientRows rows{positions, lengths, own.z, own.w};
    const Element *flowing = flow + blockIdx.y * array, *source = nodes + source_of(edge) * array;
    float* part = parts + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * size;
    Element* stages = reinterpret_cast<Element*>(memory);
    if (map < 3)
        sum_products<1>(flowing, source, rows, part, stages, limits, zeros, form);
    else if (map == 3)
        sum_products<3>(flowing, source, rows, part, stages, limits, zeros, form);
    else
        sum_products<5>(flowing, source, rows, part, stages, limits, zeros, form);
}

// The chunks [ends[task], ends[task + 1]) of every task added in order, to where each map's gradients belong; null
// where nobody asks. Gradient: of all tensors. A block for each 256 numbers, slot and task.
template <class Gradient>
__global__ void __launch_bounds__(cell::kThreads)
    search_cell_add_kernel(const float* parts, const int* ends, const int* slots, Gradient* linear,
                           Gradient* linear_bias, Gradient* glu, Gradient* glu_bias, Gradient* conv3,
                           Gradient* conv3_bias, Gradient* conv5, Gradient* conv5_bias, int width, int size) {
    using namespace cell;
    __shared__ int found;
    if (threadIdx.x < kEdges * kMaps && slots[threadIdx.x] == static_cast<int>(blockIdx.y)) found = threadIdx.x;
    __syncthreads();  // the slot's edge and map are found
    const int map = found % kMaps, task = blockIdx.z, index = blockIdx.x * kThreads + threadIdx.x;
    const int rows = taps_of(map) * width, matrices = rows * width;
    if (index >= matrices + width) return;
    const bool bias = index >= matrices;
    const int at_part = bias ? rows * kWidth + index - matrices : index / width * kWidth + index % width;
    float total = 0;
    for (int chunk = ends[task]; chunk < ends[task + 1]; ++chunk)
        total += parts[(static_cast<int64_t>(chunk) * gridDim.y + blockIdx.y) * size + at_part];
    const int64_t edge = static_cast<int64_t>(task) * kEdges + found / kMaps;
    const int64_t at = map == 1 || map == 2 ? 2 * edge + map - 1 : edge;  // among the map's own
    Gradient* target = map == 0   ? (bias ? linear_bias : linear)
                       : map < 3  ? (bias ? glu_bias : glu)
                       : map == 3 ? (bias ? conv3_bias : conv3)
                                  : (bias ? conv5_bias : conv5);
    if (target != nullptr)
        target[bias ? at * width + index - matrices : at * matrices + index] = narrow<Gradient>(total);
}

}  // namespace cuda
}  // namespace tarp
