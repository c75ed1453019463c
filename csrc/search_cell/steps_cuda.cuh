// What a cell multiplies: its windows of rows, its edges' weights, and the list of its products.
#pragma once

#include "common/cuda/warp.cuh"
#include "search_cell/tiles_cuda.cuh"

namespace tarp {
namespace cuda {
namespace cell {

constexpr int kEdges = 9, kOperations = 6, kMaps = 5;
constexpr int kMostSteps = kEdges * 11;  // products forward with every operation alive

// A window: `first` is the token of its first row, [begin, end) are owned, all of one task.
struct Window {
    int task, first, begin, end;
};

// The affine maps of an edge: linear, the value and the gate of glu, conv3, conv5.
__device__ __forceinline__ int taps_of(int map) {
    return map < 3 ? 1 : 2 * map - 3;
}
__device__ __forceinline__ int operation_of(int map) {
    return map + (map < 2 ? 2 : 1);
}
// Nodes s0, s1, n0, n1, n2 are 0 to 4. Edges 0, 1 go to n0, 2 to 4 to n1, 5 to 8 to n2, each from its node's first
// predecessor on.
__device__ __forceinline__ int first_edge(int node) {
    return node == 2 ? 0 : node == 3 ? 2 : 5;
}
__device__ __forceinline__ int source_of(int edge) {
    return edge < 2 ? edge : edge < 5 ? edge - 2 : edge - 5;
}

// A number of a bias or of LayerNorm.
template <class Element>
__device__ __forceinline__ float number(const void* tensor, int64_t index, int wide) {
    return wide ? static_cast<const float*>(tensor)[index] : widen(static_cast<const Element*>(tensor)[index]);
}

// Eight neighbours of them, the first at a multiple of eight.
template <class Element>
__device__ __forceinline__ void eight_numbers(float (&found)[8], const void* tensor, int64_t index, int wide) {
    if (wide) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + index);
        const float4 lower = from[0], upper = from[1];
        found[0] = lower.x, found[1] = lower.y, found[2] = lower.z, found[3] = lower.w;
        found[4] = upper.x, found[5] = upper.y, found[6] = upper.z, found[7] = upper.w;
    } else {
        const uint4 piece = *reinterpret_cast<const uint4*>(static_cast<const Element*>(tensor) + index);
        const Element* numbers = reinterpret_cast<const Element*>(&piece);
#pragma unroll
        for (int j = 0; j < 8; ++j) found[j] = widen(numbers[j]);
    }
}

// One product of a cell: an edge's map's tap, forward or back to the map's input.
struct Step {
    int edge, map, tap;
    bool back;

    static __device__ __forceinline__ uint16_t packed(int edge, int map, int tap, bool back) {
        return static_cast<uint16_t>(edge << 8 | back << 7 | map << 4 | tap);
    }
    static __device__ __forceinline__ Step of(uint16_t packed) {
        return {packed >> 8, packed >> 4 & 7, packed & 15, (packed & 128) != 0};
    }
    __device__ __forceinline__ int taps() const { return taps_of(map); }
    // Of the row that the tap sees.
    __device__ __forceinline__ int shift(int causal) const { return causal ? tap + 1 - taps() : tap - taps() / 2; }
};

// The products of a cell's selected operations, one edge a lane, as one list in the order of lanes. Called by one warp;
// returns their number to all lanes. each(add) calls add(map, back) for what its lane's edge needs.
template <class Each>
__device__ __forceinline__ int list_steps(uint16_t* list, int edge, Each each) {
    int own = 0;
    each([&](int map, bool) { own += taps_of(map); });
    const int after = sum_up_to_lane(own);  // steps up to this lane's last
    uint16_t* next = list + after - own;
    each([&](int map, bool back) {
        for (int tap = 0; tap < taps_of(map); ++tap) *next++ = Step::packed(edge, map, tap, back);
    });
    return of_lane(after, 31);
}

// Forward through the edges [0, to).
__device__ __forceinline__ int list_forward(uint16_t* list, const float* alpha, int to) {
    const int edge = threadIdx.x % 32;
    return list_steps(list, edge, [&](auto add) {
        if (edge >= to) return;
        for (int map = 0; map < kMaps; ++map)
            if (alpha[edge * kOperations + operation_of(map)] != 0) add(map, false);
    });
}

// Back from the last edge to the first: the maps of each forward, every one if asked for, and the selected ones back.
__device__ __forceinline__ int list_backward(uint16_t* list, const float* alpha, bool every) {
    const int edge = kEdges - 1 - static_cast<int>(threadIdx.x) % 32;
    return list_steps(list, edge, [&](auto add) {
        if (edge < 0) return;
        for (int map = 0; map < kMaps; ++map) {
            const bool alive = alpha[edge * kOperations + operation_of(map)] != 0;
            if (alive || every) add(map, false);
            if (map == 1 || !alive) continue;  // the value of glu waits for the gate
            if (map == 2) add(1, true);
            add(map, true);
        }
    });
}

// The weights of one task's edges.
template <class Element>
struct Edges {
    const Element *linear, *glu, *conv3, *conv5;
    const void *linear_bias, *glu_bias, *conv3_bias, *conv5_bias;
    int width, wide, first;  // first: of this task's edges among those of all tasks

    __device__ __forceinline__ const Element* matrix(const Step& step) const {
        const int64_t edge = first + step.edge, size = width * width;
        if (step.map == 0) return linear + edge * size;
        if (step.map < 3) return glu + (2 * edge + step.map - 1) * size;
        return step.map == 3 ? conv3 + (3 * edge + step.tap) * size : conv5 + (5 * edge + step.tap) * size;
    }

    __device__ __forceinline__ float bias(int edge, int map, int column) const {
        if (column >= width) return 0;
        const int64_t at = first + edge;
        if (map == 0) return number<Element>(linear_bias, at * width + column, wide);
        if (map < 3) return number<Element>(glu_bias, (2 * at + map - 1) * width + column, wide);
        return number<Element>(map == 3 ? conv3_bias : conv5_bias, at * width + column, wide);
    }
};

// The two rows of a left factor that a lane loads, and which neighbours of theirs a tap may see: shifts [from, to).
struct Places {
    int from[2], to[2];

    // Neither beyond a token's sequence nor beyond the window.
    __device__ __forceinline__ void find(const Window& window, int tokens, const int* positions, const int* lengths) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int token = window.first + left_row(m);
            const bool there = token >= 0 && token < tokens;
            from[m] = there ? -min(positions[token], left_row(m)) : 0;
            to[m] = there ? min(lengths[token] - positions[token], kRows - left_row(m)) : 0;
        }
    }

    // Each row's neighbour `shift` tokens further on, zeros where it may not be seen.
    template <class Element>
    __device__ __forceinline__ LeftRows<Element> shifted(const Element* tile, int shift, const Element* zeros) const {
        LeftRows<Element> found;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int at = left_row(m) + shift;
            found.row[m] = shift >= from[m] && shift < to[m] ? tile + at * kWidth : zeros;
            found.exchange[m] = at & 7;
        }
        return found;
    }
};

}  // namespace cell
}  // namespace cuda
}  // namespace tarp
