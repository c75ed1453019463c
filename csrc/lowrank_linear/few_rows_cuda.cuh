// y = x Wᵀ + b + scaling · z Uᵀ for few rows of x, in one launch: decoding, and steps on a few examples.
//
// The floor is the bytes of W: 2 N K, read once, 16 bytes a load. Beside them each output tile reads x once, T K 2
// bytes for 64 · K · 2 of W; V, w1, U and y are read or written once. Only h, x w1ᵀ and, of an MLP, b1, w2 and b2 are
// read by every tile.
//
// Blocks take tiles of 64 rows of a stack: the rows [V; w1] of every task first, then W. A tile's depth K is split over
// blocks, which write partial sums; the last of them to arrive adds these up in their order, so the bits do not depend
// on who was last. The first tiles give h = x Vᵀ and x w1ᵀ; a block that finishes a tile of W waits for them, makes z,
// and writes y. Blocks are numbered in the order in which they start, so whoever is waited for runs already.
//
// Tensor cores multiply [16 rows of the stack] x [8 tokens]: eight adjacent numbers of a row, one load, serve as four
// words of A in two steps, and as the sums over k may be taken in any order, B is x read in the same one.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"
#include "lowrank_linear/adapter_cuda.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/middle_cuda.cuh"
#include "lowrank_linear/places_cuda.cuh"

namespace tarp {
namespace cuda {

constexpr int kTileRows = 64, kThreads = 256, kMostTokens = 64;
constexpr int kChunk = 32;  // the depth of two steps; warps 0 to 3 take every other chunk of 64 rows, 4 to 7 the rest
constexpr int kPad = 32;    // elements behind a row of x in shared memory: rows 64 bytes apart modulo 128 share no bank
constexpr int kSumRow = kTileRows + 4;  // the four columns of a lane's group fall into banks eight apart

// sum += [16 rows] x [tokens]ᵀ over `depth` numbers: rows `upper` and `lower` of this lane, null past the last.
template <class Element, int kTokenTiles, bool kWide>
__device__ __forceinline__ void multiply(float (&sum)[kTokenTiles][4], const void* upper, const void* lower,
                                         const Element* staged, int width, int depth) {
    constexpr int kAhead = kTokenTiles < 8 ? 4 : 2;  // chunks whose loads are under way at a time: registers are few
    const int lane = threadIdx.x % 32, half = threadIdx.x / 128;
    const Element* own = staged + lane / 4 * width;
    for (int begin = half * kChunk; begin < depth; begin += kAhead * 2 * kChunk) {
        uint4 a[kAhead], b[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int k = begin + i * 2 * kChunk + lane % 4 * 8;
            a[i] = load_8<Element, kWide>(upper, k, upper != nullptr && k < depth);
            b[i] = load_8<Element, kWide>(lower, k, lower != nullptr && k < depth);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (begin + i * 2 * kChunk >= depth) break;  // no x was put there
            const int k = begin + i * 2 * kChunk + lane % 4 * 8;
            const uint32_t first[4] = {a[i].x, b[i].x, a[i].y, b[i].y}, second[4] = {a[i].z, b[i].z, a[i].w, b[i].w};
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
                const uint4 of_x = *reinterpret_cast<const uint4*>(own + 8 * t * width + k);
                multiply_16x8x16<Element>(sum[t], first, of_x.x, of_x.y);
                multiply_16x8x16<Element>(sum[t], second, of_x.z, of_x.w);
            }
        }
    }
}

// The task whose rows [segments[i], segments[i + 1]) hold this one; some task where the offsets are no offsets.
__device__ __forceinline__ int task_of(int token, const int64_t* segments, int tasks) {
    int low = 0, high = tasks - 1;  // the last task that starts at or before the row
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (segments[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// counts: blocks started, tiles of the first kind done, blocks done, then for each tile the blocks that arrived. All
// are zero before and after. middle: [T, r + first] floats. partials: [tiles, splits, T, 64] floats; null with one
// split.
template <class Element, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows_kernel(const Element* x, const Element* weight, const Element* bias, const void* V, const void* U,
                    const void* w1, const void* b1, const void* w2, const void* b2, const int64_t* segments,
                    const int64_t* read, const int64_t* write, const double* scaling_at, Element* y, float* h, float* s,
                    float* u, float* partials, float* middle, uint32_t* counts, const FewRowsForm form) {
    constexpr int kTokens = 8 * kTokenTiles;
    extern __shared__ __align__(128) unsigned char memory[];
    Element* staged = reinterpret_cast<Element*>(memory);  // [kTokens][stage + kPad]
    float* sums = reinterpret_cast<float*>(memory);        // [kTokens][kSumRow], when x is no longer needed
    __shared__ uint32_t message;
    __shared__ int tasks_of[kMostTokens], read_at[kMostTokens], written_at[kMostTokens];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, group = lane / 4, place = lane % 4;
    const int stacked = form.rank + form.first, tiles_of_task = (stacked + kTileRows - 1) / kTileRows;
    const int first_tiles = form.tasks * tiles_of_task;

    if (thread == 0) message = atomicAdd(counts, 1);
    if (thread < form.rows) {
        tasks_of[thread] = task_of(thread, segments, form.tasks);
        read_at[thread] = place_of(thread, read, form.x_rows);
        written_at[thread] = place_of(thread, write, form.y_rows);
    }
    __syncthreads();
    const int number = message, tile = number / form.splits, split = number % form.splits;
    const bool dense = tile >= first_tiles;
    const int task = dense ? 0 : tile / tiles_of_task;
    const int row0 = (dense ? tile - first_tiles : tile % tiles_of_task) * kTileRows;
    const int rows = dense ? form.out : stacked;
    const bool needed = dense || form.tasks == 1 || segments[task] < segments[task + 1];

    // --- partial sums of the tile over this block's share of the depth
    const bool wide = !dense && form.wide;
    const auto row_of = [&](int row) -> const void* {
        if (row >= rows || !needed) return nullptr;
        if (dense) return weight + static_cast<int64_t>(row) * form.weight_row;
        const bool of_V = row < form.rank;
        const int64_t of_task = of_V ? static_cast<int64_t>(task) * form.rank + row
                                     : static_cast<int64_t>(task) * form.first + row - form.rank;
        return static_cast<const char*>(of_V ? V : w1) + of_task * form.in * (wide ? 4 : 2);
    };
    const int own_row = row0 + warp % 4 * 16 + group;
    const void *upper = row_of(own_row), *lower = row_of(own_row + 8);
    const auto from_element = [&](const void* row, int k) -> const void* {
        return row == nullptr ? nullptr : static_cast<const char*>(row) + static_cast<int64_t>(k) * (wide ? 4 : 2);
    };
    const int chunks = (form.in + kChunk - 1) / kChunk;
    const int begin = chunks * split / form.splits * kChunk;
    const int end = needed ? min(form.in, chunks * (split + 1) / form.splits * kChunk) : begin;
    const int width = form.stage + kPad;
    float sum[kTokenTiles][4] = {};
    for (int from = begin; from < end; from += form.stage) {
        const int depth = min(form.stage, end - from);
        const int pieces = (depth + kChunk - 1) / kChunk * (kChunk / 8);
        __syncthreads();  // the x of the last stage has been read
        for (int i = thread; i < kTokens * pieces; i += kThreads) {
            const int token = i / pieces, k = i % pieces * 8;
            const bool inside = token < form.rows && k < depth;
            uint4 piece = make_uint4(0, 0, 0, 0);
            if (inside)
                piece =
                    *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(read_at[token]) * form.x_row + from + k);
            *reinterpret_cast<uint4*>(staged + token * width + k) = piece;
        }
        __syncthreads();  // the x of this one is there
        const void *above = from_element(upper, from), *below = from_element(lower, from);
        if (wide)
            multiply<Element, kTokenTiles, true>(sum, above, below, staged, width, depth);
        else
            multiply<Element, kTokenTiles, false>(sum, above, below, staged, width, depth);
    }

    // --- both halves of the warps, then all splits, added up in their order
    __syncthreads();  // x has been read
    for (int turn = 0; turn < 2; ++turn) {
        if (warp / 4 == turn)
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = 8 * t + 2 * place + i % 2, row = warp % 4 * 16 + group + i / 2 * 8;
                    float* at = sums + token * kSumRow + row;
                    *at = turn == 0 ? sum[t][i] : *at + sum[t][i];
                }
        __syncthreads();  // the other half's turn
    }
    bool finishes = true;
    if (form.splits > 1) {
        const int size = form.rows * kTileRows;
        float* of_tile = partials + static_cast<int64_t>(tile) * form.splits * size;
        for (int i = thread; i < size; i += kThreads)
            of_tile[split * size + i] = sums[i / kTileRows * kSumRow + i % kTileRows];
        finishes = raise(counts + 3 + tile, &message) == form.splits - 1;
        if (finishes) {
            for (int i = thread; i < size; i += kThreads) {
                float total = 0;
                for (int part = 0; part < form.splits; ++part)
                    total += load_from_second_level(of_tile + part * size + i);
                sums[i / kTileRows * kSumRow + i % kTileRows] = total;
            }
            if (thread == 0) counts[3 + tile] = 0;
            __syncthreads();
        }
    }

    if (finishes && !dense) {
        for (int i = thread; i < form.rows * kTileRows; i += kThreads) {
            const int token = i / kTileRows, row = row0 + i % kTileRows;
            if (row < rows && tasks_of[token] == task)
                middle[token * stacked + row] = sums[token * kSumRow + i % kTileRows];
        }
        raise(counts + 1, &message);
    } else if (finishes) {
        float* z = sums + kTokens * kSumRow;                                    // [T][r]
        float* hidden = z + form.rows * form.rank;                              // [T][first] of an MLP
        float* factor = hidden + (w2 == nullptr ? 0 : form.rows * form.first);  // [64][r | 1] of U
        wait_for(counts + 1, first_tiles);
        const bool keeps = row0 == 0;
        const bool wide_adapter = form.wide != 0;
        const Middle<Element> of_call{{b1, wide_adapter},  {w2, wide_adapter},  {b2, wide_adapter},
                                      keeps ? h : nullptr, keeps ? s : nullptr, keeps ? u : nullptr};
        const float scaling = scaling_at == nullptr ? form.scaling : static_cast<float>(*scaling_at);
        of_call.make(
            form, form.rows, scaling,
            [&](int token, int column) { return load_from_second_level(middle + token * stacked + column); },
            [&](int token) { return tasks_of[token]; }, hidden, [&](int i, float value) { z[i] = value; });

        // Each thread adds z Uᵀ for one row of the tile and every fourth token. An odd row of U shares no bank.
        const int factor_row = form.rank | 1, own = thread % kTileRows, tall = min(kTileRows, form.out - row0);
        const Adapter<Element> of_U{U, form.wide != 0};
        float value[kTokens / 4] = {};
        for (int token = 0; token < form.rows;) {  // task by task
            const int now = tasks_of[token];
            const int64_t base = (static_cast<int64_t>(now) * form.out + row0) * form.rank;
            __syncthreads();  // z is there, and the last task's U has been read
            for (int i = thread; i < tall * form.rank; i += kThreads)
                factor[i / form.rank * factor_row + i % form.rank] = of_U[base + i];
            __syncthreads();  // this task's U is there
            if (own < tall)
                for (int j = 0; j < form.rank; ++j) {
                    const float of_row = factor[own * factor_row + j];
#pragma unroll
                    for (int q = 0; q < kTokens / 4; ++q) {
                        const int mine = thread / kTileRows + 4 * q;
                        if (mine < form.rows && tasks_of[mine] == now) value[q] += z[mine * form.rank + j] * of_row;
                    }
                }
            while (token < form.rows && tasks_of[token] == now) ++token;
        }
        if (own < tall) {
            const float shift = bias == nullptr ? 0 : widen(bias[row0 + own]);
#pragma unroll
            for (int q = 0; q < kTokens / 4; ++q) {
                const int token = thread / kTileRows + 4 * q;
                if (token < form.rows)
                    y[static_cast<int64_t>(written_at[token]) * form.out + row0 + own] =
                        narrow<Element>(sums[token * kSumRow + own] + value[q] + shift);
            }
        }
    }
    if (raise(counts + 2, &message) == gridDim.x - 1 && thread == 0) counts[0] = counts[1] = counts[2] = 0;
}

}  // namespace cuda
}  // namespace tarp
