// The gradients of a search cell in one launch: that of h, and whatever the sums over rows for the weights need.
// Nothing of forward is kept: a block makes s0, s1, n0 and n1 of its window again, and then goes through the edges from
// the last to the first. An edge's maps are computed once more, for what their relus and gates let through, and what
// flows back into them goes on to the edge's input at once.
//
// A token costs 2 C (5 d + C · taps of n0's and n1's maps + 2 C · taps of all maps) operations; its bytes are 6 d, and
// 2 C for each array that is asked for. Bytes of a block from the second-level cache: the weights, those of a selected
// map two or three times. A window shares `halo` rows with each neighbour: in front what forward needs, behind what
// reads the owned rows.
#pragma once

#include "search_cell/cell_cuda.cuh"

namespace tarp {
namespace cuda {

namespace cell {

// One of three sums of a node's gradient, kept in memory between the edges that add to it: only its own thread looks.
struct Held {
    float4* at;

    __device__ __forceinline__ void save(const Sums& sums) const {
        const float* numbers = &sums.at[0][0][0];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            at[i * kThreads + threadIdx.x] =
                make_float4(numbers[4 * i], numbers[4 * i + 1], numbers[4 * i + 2], numbers[4 * i + 3]);
    }
    __device__ __forceinline__ void load(Sums& sums) const {
        float* numbers = &sums.at[0][0][0];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 four = at[i * kThreads + threadIdx.x];
            numbers[4 * i] = four.x, numbers[4 * i + 1] = four.y, numbers[4 * i + 2] = four.z,
                        numbers[4 * i + 3] = four.w;
        }
    }
};

// The owned rows of a tile to out [T, columns of a row], from column `column0` of each row on.
template <class Element>
__device__ __forceinline__ void store_rows(const Element* tile, Element* out, int row_size, int column0, int width,
                                           const Window& window) {
    const auto target = [&](int row, int column) {
        return out + static_cast<int64_t>(window.first + row) * row_size + column0 + column;
    };
    const auto owned = [&](int row, int column) {
        return row >= window.begin - window.first && row < window.end - window.first && column < width;
    };
    if (width % 8 == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = threadIdx.x / 8 + i * 32, column = threadIdx.x % 8 * 8;
            store_16(target(row, column), *reinterpret_cast<const uint4*>(tile + place(row, column)),
                     owned(row, column));
        }
    } else {
        for (int i = threadIdx.x; i < kTile; i += kThreads) {
            const int row = i / kWidth, column = i % kWidth;
            store_2(target(row, column), reinterpret_cast<const uint16_t*>(tile)[place(row, column)],
                    owned(row, column));
        }
    }
}

// ⟨a, b⟩ over this warp's part of the owned rows, to all of its lanes.
__device__ __forceinline__ float inner_product(Sums& a, const Sums& b, const Window& window) {
    float total = 0;
    const int lane = threadIdx.x % 32, from = window.begin - window.first, to = window.end - window.first;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = warp_row() + m * 16 + lane / 4 + i / 2 * 8;
                if (row >= from && row < to) total += a.at[m][n][i] * b.at[m][n][i];
            }
    return sum_over_lanes<32>(total);
}

}  // namespace cell

// slots [9, 5]: the array of `flow` of each edge's map, -1 for none. Written for the owned rows where not null: dh, of
// the stem if there is a LayerNorm; alpha_parts [windows, 54], ⟨dnode, op(input)⟩; flow [slots, T, C], what flows back
// into each map; nodes [4, T, C], s0 to n1; mean [T, C] of n0 to n2; ds [T, 2 C], of both projections before relu.
template <class Element>
__global__ void __launch_bounds__(cell::kThreads, 1)
    search_cell_backward_kernel(const Element* h, const void* norm, const void* norm_bias, const Element* project,
                                const void* project_bias, const Element* linear, const void* linear_bias,
                                const Element* glu, const void* glu_bias, const Element* conv3, const void* conv3_bias,
                                const Element* conv5, const void* conv5_bias, const Element* output, const float* alpha,
                                const int* positions, const int* lengths, const int4* windows, const int* slots,
                                const Element* dout, Element* dh, float* alpha_parts, Element* flow, Element* nodes,
                                Element* mean_out, Element* ds, const CellForm form) {
    using namespace cell;
    extern __shared__ __align__(128) unsigned char memory[];
    // s0, s1, n0, n1; with n1's tile and the next the gradient of n0, when n1 is no longer read; the gradients of s0
    // and s1; what flows back into a map; weights on their way.
    Element* tiles = reinterpret_cast<Element*>(memory);
    const auto floats_at = [&](int tile) { return Held{reinterpret_cast<float4*>(tiles + tile * kTile)}; };
    const Held of_n0 = floats_at(3), of_s0 = floats_at(5), of_s1 = floats_at(7);
    Element *returning = tiles + 9 * kTile, *ring = tiles + 10 * kTile;
    __shared__ __align__(128) Element zeros[kWidth];
    __shared__ float own_alpha[kEdges * kOperations], inner_products[kThreads / 32][kEdges * kOperations];
    __shared__ uint16_t forward_steps[kMostSteps], steps[2 * kMostSteps];
    __shared__ int counted[2];
    const int4 own = windows[blockIdx.x];
    const Window window{own.x, own.y, own.z, own.w};
    const int task = form.per_task ? window.task : 0, warp = threadIdx.x / 32;
    const bool every = alpha_parts != nullptr;
    if (threadIdx.x < kWidth) zeros[threadIdx.x] = narrow<Element>(0);
    if (threadIdx.x < kEdges * kOperations) own_alpha[threadIdx.x] = alpha[window.task * form.alpha_task + threadIdx.x];
    __syncthreads();  // alpha is there
    if (warp < 2) {
        const int count =
            warp == 0 ? list_forward(forward_steps, own_alpha, first_edge(4)) : list_backward(steps, own_alpha, every);
        if (threadIdx.x % 32 == 0) counted[warp] = count;
    }
    for (int i = threadIdx.x; i < kEdges * kOperations * (kThreads / 32); i += kThreads) (&inner_products[0][0])[i] = 0;
    Places places;
    places.find(window, form.tokens, positions, lengths);
    const Edges<Element> edges{linear,     glu,        conv3,      conv5,     linear_bias,  glu_bias,
                               conv3_bias, conv5_bias, form.width, form.wide, task * kEdges};
    const int depths = (form.d + kWidth - 1) / kWidth;
    const int from = max(0, -window.first), to = min(kRows, form.tokens - window.first);

    // --- the gradient of the mean, and with it of n2
    Sums d, later, product, value;
    d.fill(0);
    {
        const Element* rows = dout + static_cast<int64_t>(window.first) * form.d;
        const Element* of_task = output + static_cast<int64_t>(task) * form.d * form.width;
        pipeline(
            depths, min(kMostStages, (10 + form.stages) / 2),
            [&](int n, int stage) {
                Element* tile = tiles + stage * 2 * kTile;
                const int k = n * kWidth;
                fetch(tile, rows + k, form.d, from, to, form.d - k, dout);
                fetch(tile + kTile, of_task + static_cast<int64_t>(k) * form.width, form.width, 0, form.d - k,
                      form.width, of_task);
            },
            [&](int, int stage) {
                Element* tile = tiles + stage * 2 * kTile;
                multiply<Element, false>(d, rows_of(tile), tile + kTile);
            });
        d.each([](int, int, float& first, float& second) { first *= 1.0f / 3, second *= 1.0f / 3; });
        __syncthreads();  // dout has been multiplied
    }

    // --- the nodes again
    {
        Sums s[2];
        cell::project(s, h, norm, norm_bias, project, window, form, tiles, min(kMostStages, (10 + form.stages) / 3));
        __syncthreads();  // the projections have been multiplied
        keep_inputs<Element>(s, project_bias, task, form, tiles);
    }
    make_nodes(3, product, forward_steps, counted[0], own_alpha, edges, places, tiles, ring, zeros, form);
    put(tiles + 3 * kTile, product);
    Sums mean;
    mean.fill(0);
    if (mean_out != nullptr) add(mean, 1, tiles + 2 * kTile), add(mean, 1, tiles + 3 * kTile);
    __syncthreads();  // the nodes are there
    const int64_t array = static_cast<int64_t>(form.tokens) * form.width;
    if (nodes != nullptr)
        for (int node = 0; node < 4; ++node)
            store_rows(tiles + node * kTile, nodes + node * array, form.width, 0, form.width, window);
    if (flow != nullptr)  // what other tasks selected
        for (int i = 0; i < kEdges * kMaps; ++i)
            if (slots[i] >= 0 && own_alpha[i / kMaps * kOperations + operation_of(i % kMaps)] == 0)
                for (int j = threadIdx.x; j < (window.end - window.begin) * form.width; j += kThreads)
                    flow[slots[i] * array + static_cast<int64_t>(window.begin) * form.width + j] = narrow<Element>(0);

    // --- back through the edges; d is the gradient of the node that an edge goes to, `later` that of the next
    Sums sum;  // the gradient of the edge's input
    int edge = kEdges - 1;
    const auto source_values = [&](Sums& values) {
        const Element* tile = tiles + source_of(edge) * kTile;
        values.each([&](int row, int column, float& first, float& second) {
            first = widen(tile[place(row, column)]), second = widen(tile[place(row, column + 1)]);
        });
    };
    const auto begin_edge = [&]() {
        const int source = source_of(edge);
        if (edge >= 7)
            sum = d;  // which is the mean's
        else if (edge >= 5)
            sum.fill(0);
        else
            (source == 2 ? of_n0 : source == 1 ? of_s1 : of_s0).load(sum);
        const float a = own_alpha[edge * kOperations + 1];
        sum.with(d, [a](float& own, float of_node) { own += a * of_node; });
        if (every || (mean_out != nullptr && edge >= 5 && a != 0)) {
            source_values(value);
            if (every) {
                const float found = inner_product(d, value, window);
                if (threadIdx.x % 32 == 0) inner_products[warp][edge * kOperations + 1] = found;
            }
            if (edge >= 5 && a != 0) mean.with(value, [a](float& own, float added) { own += a * added; });
        }
    };
    const auto end_edge = [&]() {
        const int source = source_of(edge);
        if (edge == 8 || edge == 4)
            later = sum;
        else if (edge >= 2)
            (source == 2 ? of_n0 : source == 1 ? of_s1 : of_s0).save(sum);
        else {
            source_values(value);
            sum.with(value, [](float& own, float input) { own = input > 0 ? own : 0; });
            put(tiles + source * kTile, sum);
        }
        if (edge == 5 || edge == 2) d = later;
        if (edge == 5 && mean_out != nullptr) {
            mean.each([](int, int, float& first, float& second) { first *= 1.0f / 3, second *= 1.0f / 3; });
            put(returning, mean);
            __syncthreads();  // the mean is there
            store_rows(returning, mean_out, form.width, 0, form.width, window);
        }
        --edge;
    };
    begin_edge();
    each_step(steps, counted[1], edges, ring, form.stages, [&](const Step& step, const Element* tile) {
        for (; step.edge < edge; begin_edge()) end_edge();
        const float a = own_alpha[edge * kOperations + operation_of(step.map)];
        if (step.back) {
            if (step.tap == 0) {
                if (step.map == 1)
                    put(returning, value);
                else
                    put(returning, product);
                __syncthreads();  // what flows back is there
                if (flow != nullptr)
                    store_rows(returning, flow + slots[edge * kMaps + step.map] * array, form.width, 0, form.width,
                               window);
            }
            multiply<Element, false>(sum, places.shifted(returning, -step.shift(form.causal), zeros), tile);
            return;
        }
        const Element* source = tiles + source_of(edge) * kTile;
        if (!affine(product, step, tile, source, edges, places, zeros, form.causal)) return;
        if (step.map == 1) {
            value = product;
            return;
        }
        // `product` becomes the operation's value for a while
        const bool added = mean_out != nullptr && edge >= 5;
        Sums made;
        if (step.map == 2) {
            product.with(value, [](float& gate, float) { gate = sigmoid(gate); });
            made = product;
            made.with(value, [](float& own, float of) { own *= of; });
        } else {
            made = product;
            made.each([](int, int, float& first, float& second) {
                first = fmaxf(first, 0.0f), second = fmaxf(second, 0.0f);
            });
        }
        if (every) {
            const float found = inner_product(d, made, window);
            if (threadIdx.x % 32 == 0) inner_products[warp][edge * kOperations + operation_of(step.map)] = found;
        }
        if (a == 0) return;
        if (added) mean.with(made, [a](float& own, float term) { own += a * term; });
        if (step.map == 2) {
            // value's: a d gate; gate's: a d value gate (1 - gate)
            made.with(product, [](float& own, float gate) { own *= 1 - gate; });
            made.with(d, [a](float& own, float of_node) { own *= a * of_node; });
            value = product;
            value.with(d, [a](float& own, float of_node) { own *= a * of_node; });
            product = made;
        } else {
            product.with(d, [a](float& own, float of_node) { own = own > 0 ? a * of_node : 0; });
        }
    });
    __syncthreads();  // the last product is made
    for (; edge > 0; begin_edge()) end_edge();
    end_edge();
    __syncthreads();  // what flows back into both projections is there

    if (ds != nullptr)
        for (int i = 0; i < 2; ++i)
            store_rows(tiles + i * kTile, ds, 2 * form.width, i * form.width, form.width, window);
    if (every && threadIdx.x < kEdges * kOperations) {
        float total = 0;
        for (int i = 0; i < kThreads / 32; ++i) total += inner_products[i][threadIdx.x];
        alpha_parts[static_cast<int64_t>(blockIdx.x) * kEdges * kOperations + threadIdx.x] = total;
    }
    if (dh == nullptr) return;
    const int64_t size = static_cast<int64_t>(form.width) * form.d;
    const Element* of_task = project + task * 2 * size;
    float* staged = reinterpret_cast<float*>(tiles + 2 * kTile);
    Element* projections = tiles + 5 * kTile;
    pipeline(
        depths, min(kMostStages, (5 + form.stages) / 2),
        [&](int n, int stage) {
            const int column0 = n * kWidth;
            for (int i = 0; i < 2; ++i)
                fetch(projections + (stage * 2 + i) * kTile, of_task + i * size + column0, form.d, 0, form.width,
                      form.d - column0, of_task);
        },
        [&](int n, int stage) {
            const int column0 = n * kWidth;
            Pieces pieces{};
            if (norm == nullptr) pieces.load(dout, column0, window, form.d);
            product.fill(0);
            for (int i = 0; i < 2; ++i)
                multiply<Element, false>(product, rows_of(tiles + i * kTile), projections + (stage * 2 + i) * kTile);
            pieces.write<Element>(product, staged, nullptr, 0, 0, dh, column0, window, form.d);
        });
}

}  // namespace cuda
}  // namespace tarp
