// y = x Wᵀ + b + scaling · z Uᵀ for few rows of x, in one launch: decoding, and steps on a few examples.
//
// The floor is the bytes of W: 2 N K, read once, 16 bytes a load. Beside them each output tile reads x once, T K 2
// bytes for 64 · K · 2 of W; V, w1, U and y are read or written once.
//
// Blocks take tiles of 64 rows of a stack: the rows [V; w1] of every task first, then W. A tile's depth K is split over
// blocks, which write partial sums; the last of them to arrive adds these up in their order, so the bits do not depend on
// who was last. The first tiles give h = x Vᵀ and x w1ᵀ; a block that finishes a tile of W waits for them, makes z, and
// writes y. Blocks are numbered in the order in which they start, so whoever is waited for runs already.
//
// Tensor cores multiply [16 rows of the stack] x [8 tokens]: eight adjacent numbers of a row, one load, serve as four
// words of A in two steps, and as the sums over k may be taken in any order, B is x read in the same one.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"

namespace tarp {
namespace cuda {

constexpr int kTileRows = 64, kThreads = 256, kChunk = 32;  // kChunk: depth of two steps
constexpr int kPad = 32;  // elements behind a row of x in shared memory: rows 64 bytes apart modulo 128 share no bank

constexpr int kSumRow = kTileRows + 4;  // the four columns of a lane's group fall into banks eight apart

enum Activation { kNone, kOnePlus, kSigmoid, kTanh, kSoftplus, kRelu, kGelu, kSilu };

struct FewRowsForm {
    int rows, in, out, rank, first, outputs;  // T, K, N, r, rows of w1, S = r or r²; first = 0: s = 1
    int tasks, splits, stage;                 // stage: depth of x in shared memory at a time, a multiple of 64
    int x_row, weight_row;                    // elements
    int hidden_activation, activation, full;
    float scaling;
};

// The fast exponential is off by 2⁻²¹, which half precision does not see.
__device__ __forceinline__ float activate(int kind, float v) {
    switch (kind) {
        case kOnePlus:
            return 1 + v;
        case kSigmoid:
            return 1 / (1 + __expf(-v));
        case kTanh:
            return tanhf(v);
        case kSoftplus:
            return fmaxf(v, 0.0f) + __logf(1 + __expf(-fabsf(v)));
        case kRelu:
            return fmaxf(v, 0.0f);
        case kGelu:
            return 0.5f * v * (1 + erff(v * 0.70710678f));
        case kSilu:
            return v / (1 + __expf(-v));
        default:
            return v;
    }
}

// One number of s = g(x): `units` are the sums x w1ᵀ of a token.
template <class Element>
__device__ __forceinline__ float generate(const FewRowsForm& form, const float* units, int which, const Element* b1,
                                          const Element* w2, const Element* b2, bool on_diagonal) {
    float g;
    if (w2 == nullptr) {
        g = load_from_second_level(units + which) + (b1 == nullptr ? 0 : widen(b1[which]));
    } else {
        g = b2 == nullptr ? 0 : widen(b2[which]);
        for (int i = 0; i < form.first; ++i) {
            const float unit = load_from_second_level(units + i) + (b1 == nullptr ? 0 : widen(b1[i]));
            g += widen(w2[which * form.first + i]) * activate(form.hidden_activation, unit);
        }
    }
    if (form.activation == kOnePlus) return on_diagonal ? 1 + g : g;
    return activate(form.activation, g);
}

// counts: blocks started, tiles of the first kind done, blocks done, then for each tile the blocks that arrived. All are
// zero before and after. middle: [T, r + first] floats. partials: [tiles, splits, T, 64] floats; null with one split.
template <class Element, int kTokenTiles>
__global__ void __launch_bounds__(kThreads)
    few_rows(const Element* x, const Element* weight, const Element* bias, const Element* V, const Element* U,
             const Element* w1, const Element* b1, const Element* w2, const Element* b2, const int64_t* segments,
             Element* y, float* h, float* s, float* u, float* partials, float* middle, uint32_t* counts,
             const FewRowsForm form) {
    constexpr int kTokens = 8 * kTokenTiles;
    extern __shared__ __align__(128) unsigned char memory[];
    Element* staged = reinterpret_cast<Element*>(memory);  // [kTokens][stage + kPad]
    float* sums = reinterpret_cast<float*>(memory);        // [kTokens][kSumRow], when x is no longer needed
    __shared__ uint32_t message;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, group = lane / 4, place = lane % 4;
    const int stacked = form.rank + form.first, tiles_of_task = (stacked + kTileRows - 1) / kTileRows;
    const int first_tiles = form.tasks * tiles_of_task;

    if (thread == 0) message = atomicAdd(counts, 1);
    __syncthreads();
    const int number = message, tile = number / form.splits, split = number % form.splits;
    __syncthreads();
    const bool dense = tile >= first_tiles;
    const int task = dense ? 0 : tile / tiles_of_task;
    const int row0 = (dense ? tile - first_tiles : tile % tiles_of_task) * kTileRows;
    const int rows = dense ? form.out : stacked;

    // --- partial sums of the tile over this block's share of the depth
    const auto row_of = [&](int row) -> const Element* {
        if (row >= rows) return nullptr;
        if (dense) return weight + static_cast<int64_t>(row) * form.weight_row;
        const bool of_V = row < form.rank;
        return of_V ? V + (static_cast<int64_t>(task) * form.rank + row) * form.in
                    : w1 + (static_cast<int64_t>(task) * form.first + row - form.rank) * form.in;
    };
    const int half = warp / 4, own = row0 + warp % 4 * 16 + group;
    const Element *upper = row_of(own), *lower = row_of(own + 8);
    const int chunks = (form.in + kChunk - 1) / kChunk;
    const int begin = static_cast<int64_t>(chunks) * split / form.splits * kChunk;
    const int end = min(form.in, static_cast<int>(static_cast<int64_t>(chunks) * (split + 1) / form.splits) * kChunk);
    float sum[kTokenTiles][4] = {};
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int width = form.stage + kPad;
    for (int from = begin; from < end; from += form.stage) {
        const int depth = min(form.stage, end - from);
        __syncthreads();
        const int pieces = (depth + kChunk - 1) / kChunk * (kChunk / 8);
        for (int i = thread; i < kTokens * pieces; i += kThreads) {
            const int token = i / pieces, k = i % pieces * 8;
            const bool inside = token < form.rows && k < depth;
            const Element* source = x + static_cast<int64_t>(token) * form.x_row + from + k;
            *reinterpret_cast<uint4*>(staged + token * width + k) =
                inside ? *reinterpret_cast<const uint4*>(source) : zero;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = half * kChunk + 8 * place; k < pieces * 8; k += 2 * kChunk) {
            const bool inside = k < depth;
            const uint4 a = inside && upper != nullptr ? load_16_once(upper + from + k) : zero;
            const uint4 b = inside && lower != nullptr ? load_16_once(lower + from + k) : zero;
            const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
                const uint4 of_x = *reinterpret_cast<const uint4*>(staged + (8 * t + group) * width + k);
                multiply_16x8x16<Element>(sum[t], first, of_x.x, of_x.y);
                multiply_16x8x16<Element>(sum[t], second, of_x.z, of_x.w);
            }
        }
    }

    // --- both halves of the warps, then all splits, added up in their order
    __syncthreads();
    const auto place_of = [&](int t, int i) {
        return (8 * t + 2 * place + i % 2) * kSumRow + warp % 4 * 16 + group + i / 2 * 8;
    };
    for (int turn = 0; turn < 2; ++turn) {
        if (half == turn)
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* at = sums + place_of(t, i);
                    *at = turn == 0 ? sum[t][i] : *at + sum[t][i];
                }
        __syncthreads();
    }
    if (form.splits > 1) {
        float* own_partials = partials + static_cast<int64_t>(tile) * form.splits * form.rows * kTileRows;
        const int size = form.rows * kTileRows;
        for (int i = thread; i < size; i += kThreads)
            own_partials[split * size + i] = sums[i / kTileRows * kSumRow + i % kTileRows];
        const bool last = raise(counts + 3 + tile, &message) == form.splits - 1;
        if (last) {
            for (int i = thread; i < size; i += kThreads) {
                float total = 0;
                for (int part = 0; part < form.splits; ++part)
                    total += load_from_second_level(own_partials + part * size + i);
                sums[i / kTileRows * kSumRow + i % kTileRows] = total;
            }
            if (thread == 0) counts[3 + tile] = 0;
            __syncthreads();
        }
        if (!last) goto done;
    }

    if (!dense) {
        for (int i = thread; i < form.rows * kTileRows; i += kThreads) {
            const int token = i / kTileRows, row = row0 + i % kTileRows;
            const bool mine = form.tasks == 1 || (token >= segments[task] && token < segments[task + 1]);
            if (row < rows && mine) middle[token * stacked + row] = sums[token * kSumRow + i % kTileRows];
        }
        raise(counts + 1, &message);
    } else {
        wait_for(counts + 1, first_tiles);
        float* z = sums + kTokens * kSumRow;  // [T][r]
        const auto task_of = [&](int token) {
            int found = 0;
            while (form.tasks > 1 && token >= segments[found + 1]) ++found;
            return static_cast<int64_t>(found);
        };
        for (int i = thread; i < form.rows * form.rank; i += kThreads) {
            const int token = i / form.rank, which = i % form.rank;
            const int64_t of = task_of(token);
            const float *from = middle + token * stacked, *units = from + form.rank;
            const auto shifted = [&](const Element* tensor, int64_t size) {
                return tensor == nullptr ? nullptr : tensor + of * size;
            };
            const Element* own_b1 = shifted(b1, form.first);
            const Element* own_w2 = shifted(w2, static_cast<int64_t>(form.outputs) * form.first);
            const Element* own_b2 = shifted(b2, form.outputs);
            const bool keeps = h != nullptr && row0 == 0;
            float value = 0;
            for (int j = form.full ? 0 : which; j < (form.full ? form.rank : which + 1); ++j) {
                const int output = form.full ? which * form.rank + j : j;
                const float scale =
                    form.first == 0 ? 1 : generate(form, units, output, own_b1, own_w2, own_b2, which == j);
                value += scale * load_from_second_level(from + j);
                if (keeps && form.first > 0) s[token * form.outputs + output] = scale;
            }
            if (keeps) h[token * form.rank + which] = load_from_second_level(from + which);
            z[token * form.rank + which] = form.scaling * value;
        }
        if (u != nullptr && row0 == 0)
            for (int i = thread; i < form.rows * form.first; i += kThreads) {
                const int token = i / form.first, unit = i % form.first;
                const float shift = b1 == nullptr ? 0 : widen(b1[task_of(token) * form.first + unit]);
                u[i] = load_from_second_level(middle + token * stacked + form.rank + unit) + shift;
            }
        __syncthreads();
        for (int i = thread; i < form.rows * kTileRows; i += kThreads) {
            const int token = i / kTileRows, n = row0 + i % kTileRows;
            if (n >= form.out) continue;
            float value = sums[token * kSumRow + i % kTileRows];
            const Element* own_U = U + (task_of(token) * form.out + n) * form.rank;
            for (int j = 0; j < form.rank; ++j) value += z[token * form.rank + j] * widen(own_U[j]);
            if (bias != nullptr) value += widen(bias[n]);
            y[static_cast<int64_t>(token) * form.out + n] = narrow<Element>(value);
        }
    }
done:
    if (raise(counts + 2, &message) == gridDim.x - 1 && thread == 0) counts[0] = counts[1] = counts[2] = 0;
}

}  // namespace cuda
}  // namespace tarp
