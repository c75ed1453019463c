// z = scaling · Σ(x) x Vᵀ for many rows of x, and h, s, u where backward needs them.
//
// The floor is the bytes of x: 2 T K, read once. Operations: 2 T K (r + first), that is r + first a byte, 128 at most,
// where tensor cores do 150 to 300 while a byte comes from memory. Beside x each tile of 64 rows reads [V; w1] once,
// from the second-level cache, and z, h, s and u are written once.
//
// A tile has all columns of [V; w1], so z is made where the sums are. Where the tiles of rows are too few to keep a GPU
// busy, blocks share the depth of a tile and write partial sums; the last of them to arrive adds these up in their
// order, so the bits do not depend on who was last.
//
// A stage is 64 deep, whole lines of 128 bytes: 8 KB of x. With four of them three are under way, so the two blocks
// that fit everywhere up to 32 columns keep 48 KB in flight on each multiprocessor, where 17 KB cover the latency of
// the fastest memory. Four warps make 16 rows each.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/tile.cuh"
#include "lowrank_linear/adapter_cuda.cuh"
#include "lowrank_linear/middle_cuda.cuh"
#include "lowrank_linear/places_cuda.cuh"
#include "lowrank_linear/row_tiles_cuda.cuh"
#include "lowrank_linear/skinny_cuda.h"

namespace tarp {
namespace cuda {

namespace skinny {

constexpr int kRows = 64, kDepth = 64, kStages = 4, kBlockThreads = 128;
constexpr int kPieces = kDepth / 8;                   // of 16 bytes, in a row
constexpr int kRowsAtOnce = kBlockThreads / kPieces;  // that the threads copy a piece each of
constexpr int kGap = 8;                               // floats behind a row of sums: four rows share no bank

template <int kColumns>
constexpr int kStage = (kRows + kColumns) * kDepth;  // elements: a tile of x, then one of [V; w1]

// The stages, and in their place the sums [64][kColumns + kGap], then the units [64][first] of an MLP, at most 64.
template <int kColumns>
constexpr int kSharedBytes = kStages * kStage<kColumns> * 2;

}  // namespace skinny

template <class Element, int kColumns>
__global__ void __launch_bounds__(skinny::kBlockThreads, 4)
    skinny_kernel(const Element* x, const void* V, const void* w1, const void* b1, const void* w2, const void* b2,
                  const int64_t* segments, const int64_t* read, const double* scaling_at, Element* z, float* h,
                  float* s, float* u, float* partials, uint32_t* counts, const SkinnyForm form) {
    using namespace skinny;
    constexpr int kUnrolled = kColumns <= 64 ? 4 : 1;  // addresses take registers
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ uint32_t message;
    Element* stages = reinterpret_cast<Element*>(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const TaskRows rows = rows_of_tile(blockIdx.x, kRows, segments, form.tasks, form.rows);
    const int count = rows.end - rows.begin, stacked = form.rank + form.first, split = blockIdx.y;
    if (count <= 0) return;

    // --- sums of the tile over this block's share of the depth
    const int own_row = thread / kPieces, piece = thread % kPieces;
    const Element* of_x[kRows / kRowsAtOnce];  // null beyond the tile
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int row = own_row + i * kRowsAtOnce;
        const int64_t at = row < count ? place_of(rows.begin + row, read, form.x_rows) : 0;
        of_x[i] = row < count ? x + at * form.x_row : nullptr;
    }
    const int steps_of_all = (form.in + kDepth - 1) / kDepth;
    const int first_step = steps_of_all * split / form.splits, end_step = steps_of_all * (split + 1) / form.splits;
    const auto fetch = [&](int number) {
        Element* stage = stages + number % kStages * kStage<kColumns>;
        const int k = number * kDepth + piece * 8;
#pragma unroll
        for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
            const bool wanted = of_x[i] != nullptr && k < form.in;
            copy_16(stage + place_of_piece<kPieces>(own_row + i * kRowsAtOnce, piece), wanted ? of_x[i] + k : x,
                    wanted);
        }
        Element* factor = stage + kRows * kDepth;
#pragma unroll kUnrolled
        for (int i = 0; i < kColumns / kRowsAtOnce; ++i) {
            const int row = own_row + i * kRowsAtOnce;
            const bool of_V = row < form.rank, wanted = row < stacked && k < form.in;
            const int64_t of_task = of_V ? static_cast<int64_t>(rows.task) * form.rank + row
                                         : static_cast<int64_t>(rows.task) * form.first + row - form.rank;
            const void* from = wanted && !of_V ? w1 : V;
            const int64_t at = wanted ? of_task * form.in + k : 0;
            Element* target = factor + place_of_piece<kPieces>(row, piece);
            if (form.wide)
                *reinterpret_cast<uint4*>(target) =
                    load_8<Element, true>(static_cast<const float*>(from) + at, 0, wanted);
            else
                copy_16(target, static_cast<const Element*>(from) + at, wanted);
        }
    };
    float sum[kColumns / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (first_step + i < end_step) fetch(first_step + i);
        end_copies();
    }
    for (int number = first_step; number < end_step; ++number) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this stage is there, and the one before has been read
        if (number + kStages - 1 < end_step) fetch(number + kStages - 1);
        end_copies();
        const Element* left = stages + number % kStages * kStage<kColumns>;
        const Element* right = left + kRows * kDepth;
#pragma unroll kUnrolled
        for (int k = 0; k < kPieces; k += 2) {
            uint32_t a[4];  // rows g, g + 8 of k, then of k + 8
            load_4_matrices(a, left + place_of_piece<kPieces>(warp * 16 + lane % 16, k + lane / 16));
#pragma unroll
            for (int n = 0; n < kColumns / 16; ++n) {
                uint32_t b[4];  // k, k + 8 of the first eight columns, then of the second
                const int row = n * 16 + lane / 16 * 8 + lane % 8;
                load_4_matrices(b, right + place_of_piece<kPieces>(row, k + lane / 8 % 2));
                multiply_16x8x16<Element>(sum[2 * n], a, b[0], b[1]);
                multiply_16x8x16<Element>(sum[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // --- the sums as rows, those of all splits added up in their order
    constexpr int kSumRow = kColumns + kGap;
    float* sums = reinterpret_cast<float*>(memory);  // [kRows][kSumRow]
    __syncthreads();                                 // the last stage has been read
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* at = sums + (warp * 16 + lane / 4 + half * 8) * kSumRow + n * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(at) = make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
        }
    __syncthreads();  // the sums are there
    if (form.splits > 1) {
        const int size = kRows * stacked, used = count * stacked;
        float* of_tile = partials + static_cast<int64_t>(blockIdx.x) * form.splits * size;
        for (int i = thread; i < used; i += kBlockThreads)
            of_tile[split * size + i] = sums[i / stacked * kSumRow + i % stacked];
        if (raise(counts + blockIdx.x, &message) != form.splits - 1) return;
        for (int i = thread; i < used; i += kBlockThreads) {
            float total = 0;
            for (int part = 0; part < form.splits; ++part) total += load_from_second_level(of_tile + part * size + i);
            sums[i / stacked * kSumRow + i % stacked] = total;
        }
        if (thread == 0) counts[blockIdx.x] = 0;
        __syncthreads();  // the totals are there
    }

    const int64_t row0 = rows.begin;
    const bool wide = form.wide != 0;
    const auto of_tile = [&](float* kept, int columns) { return kept == nullptr ? nullptr : kept + row0 * columns; };
    const Middle<Element> of_rows{
        {b1, wide}, {w2, wide}, {b2, wide}, of_tile(h, form.rank), of_tile(s, form.outputs), of_tile(u, form.first)};
    const float scaling = scaling_at == nullptr ? form.scaling : static_cast<float>(*scaling_at);
    of_rows.make(
        form, count, scaling, [&](int row, int column) { return sums[row * kSumRow + column]; },
        [&](int) { return rows.task; }, sums + kRows * kSumRow,
        [&](int i, float value) { z[row0 * form.rank + i] = narrow<Element>(value); });
}

}  // namespace cuda
}  // namespace tarp
