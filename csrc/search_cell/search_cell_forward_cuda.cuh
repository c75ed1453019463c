// out = h + Linear((n0 + n1 + n2) / 3) of a search cell in one launch: nothing but out is written.
//
// A token costs 2 C (3 d + C · taps of the selected maps) operations; its bytes are 6 d, h twice and out. Bytes of a
// block, from the second-level cache: the cell's selected weights, so 64 operations on tensor cores a byte, of which
// the second-level cache of the larger GPUs feeds 5 TB/s: tensor cores and weights bind about equally. A product of a
// tile takes a multiprocessor about 100 cycles and a copy from the second-level cache 700: as many tiles are on their
// way as shared memory holds. Rows that are made for neighbours are `halo` of 64, as many as the selected convolutions
// see. A node is rounded to h's type, which is what its products take of it anyway.
#pragma once

#include "search_cell/cell_cuda.cuh"

namespace tarp {
namespace cuda {

// positions, lengths [T]: a token's place in its sequence, and that one's length. windows: one a block.
template <class Element>
__global__ void __launch_bounds__(cell::kThreads, 2)
    search_cell_forward_kernel(const Element* h, const void* norm, const void* norm_bias, const Element* project,
                               const void* project_bias, const Element* linear, const void* linear_bias,
                               const Element* glu, const void* glu_bias, const Element* conv3, const void* conv3_bias,
                               const Element* conv5, const void* conv5_bias, const Element* output,
                               const void* output_bias, const float* alpha, const int* positions, const int* lengths,
                               const int4* windows, Element* out, const CellForm form) {
    using namespace cell;
    extern __shared__ __align__(128) unsigned char memory[];
    Element* tiles = reinterpret_cast<Element*>(memory);  // s0, s1, n0, n1, weights on their way
    Element* ring = tiles + 4 * kTile;
    __shared__ __align__(128) Element zeros[kWidth];
    __shared__ float own_alpha[kEdges * kOperations];
    __shared__ uint16_t steps[kMostSteps];
    __shared__ int counted;
    const int4 own = windows[blockIdx.x];
    const Window window{own.x, own.y, own.z, own.w};
    const int task = form.per_task ? window.task : 0;
    if (threadIdx.x < kWidth) zeros[threadIdx.x] = narrow<Element>(0);
    if (threadIdx.x < kEdges * kOperations) own_alpha[threadIdx.x] = alpha[window.task * form.alpha_task + threadIdx.x];
    __syncthreads();  // alpha is there
    if (threadIdx.x < 32) {
        const int count = list_forward(steps, own_alpha, kEdges);
        if (threadIdx.x == 0) counted = count;
    }
    Places places;
    places.find(window, form.tokens, positions, lengths);
    const Edges<Element> edges{linear,     glu,        conv3,      conv5,     linear_bias,  glu_bias,
                               conv3_bias, conv5_bias, form.width, form.wide, task * kEdges};

    {
        Sums s[2];
        cell::project(s, h, norm, norm_bias, project, window, form, tiles, min(kMostStages, (4 + form.stages) / 3));
        __syncthreads();  // the projections have been multiplied
        keep_inputs<Element>(s, project_bias, task, form, tiles);
    }
    Sums total, product;
    make_nodes(4, total, steps, counted, own_alpha, edges, places, tiles, ring, zeros, form);
    add(total, 1, tiles + 2 * kTile);
    add(total, 1, tiles + 3 * kTile);
    total.each([](int, int, float& first, float& second) { first *= 1.0f / 3, second *= 1.0f / 3; });
    __syncthreads();  // the nodes have been multiplied
    put(tiles, total);
    float* staged = reinterpret_cast<float*>(tiles + kTile);
    const int64_t size = static_cast<int64_t>(task) * form.d;
    const Element* of_task = output + size * form.width;
    pipeline((form.d + kWidth - 1) / kWidth, form.stages,
             [&](int n, int stage) {
                 const int column0 = n * kWidth;
                 fetch(ring + stage * kTile, of_task + static_cast<int64_t>(column0) * form.width, form.width, 0,
                       form.d - column0, form.width, of_task);
             },
             [&](int n, int stage) {
                 const int column0 = n * kWidth;
                 Pieces pieces;
                 pieces.load(h, column0, window, form.d);
                 product.fill(0);
                 multiply<Element, true>(product, rows_of<Element>(tiles), ring + stage * kTile);
                 pieces.write(product, staged, output_bias, size, form.wide, out, column0, window, form.d);
             });
}

}  // namespace cuda
}  // namespace tarp
