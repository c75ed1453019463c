// An adapter's gradients, sums over rows: dU = dyᵀ z, d[V; w1] = [dh, du]ᵀ x, and of an MLP generator dw2, in two
// stages.
//
// The floor is the bytes of the wider operand, dy or x: 2 T N, read once. Operations: 2 T N (r + first), at most 128 a
// byte, where tensor cores do 150 to 300 while a byte comes from memory. Beside it a block of 64 columns reads the
// narrow operand, from the second-level cache: (r + first) / 64 of these bytes. A chunk of 1024 rows leaves 4 bytes for
// each of its sums, written and read once: (r + first) / 256 of these bytes.
//
// Rows are cut into chunks at fixed places of each task, so the bits of a gradient depend neither on who was last nor
// on other tasks. A stage is 64 rows by 64 columns, 8 KB as whole lines of 128 bytes; three of four are under way. Rows
// are what is summed over: both operands reach the tensor cores transposed. Four warps make 16 of the 64 columns each.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/tile.cuh"
#include "lowrank_linear/gradients_cuda.h"
#include "lowrank_linear/places_cuda.cuh"
#include "lowrank_linear/row_tiles_cuda.cuh"

namespace tarp {
namespace cuda {

namespace tall {

constexpr int kRows = 64, kWide = 64, kStages = 4, kBlockThreads = 128;

template <int kNarrow>
constexpr int kStage = kRows * (kWide + kNarrow);  // elements: a tile of the wide operand, then one of the narrow

template <int kNarrow>
constexpr int kSharedBytes = kStages * kStage<kNarrow> * 2;

// Rows [row0, end), at most 64, of 8 · kPieces columns into a tile; zeros beyond the last of either.
template <class Element, int kPieces, int kAtOnce>
__device__ __forceinline__ void fetch(Element* tile, const Element* data, const int64_t* index,
                                      const TallOperand& operand, int column0, int row0, int end) {
    constexpr int kUnrolled = kPieces <= 8 ? kPieces : 1;
    const auto row_at = [&](int row) {
        return data + static_cast<int64_t>(place_of(row0 + row, index, operand.rows)) * operand.row;
    };
    if (operand.whole) {
#pragma unroll kUnrolled
        for (int i = threadIdx.x; i < kRows * kPieces; i += kBlockThreads) {
            const int row = i / kPieces, piece = i % kPieces, column = column0 + piece * 8;
            const bool wanted = row0 + row < end && column < operand.columns;
            copy_16(tile + place_of_piece<kPieces>(row, piece), wanted ? row_at(row) + column : data, wanted);
        }
        return;
    }
#pragma unroll kAtOnce
    for (int i = threadIdx.x; i < kRows * kPieces * 8; i += kBlockThreads) {
        const int row = i / (kPieces * 8), lane = i % (kPieces * 8), column = column0 + lane;
        const bool wanted = row0 + row < end && column < operand.columns;
        tile[place_of_piece<kPieces>(row, lane / 8) + lane % 8] =
            wanted && data != nullptr ? row_at(row)[column] : narrow<Element>(wanted);
    }
}

}  // namespace tall

template <class Element, int kNarrow>
__global__ void __launch_bounds__(tall::kBlockThreads, 4)
    tall_kernel(const Element* wide, const Element* narrow, const int64_t* wide_index, const int64_t* narrow_index,
                const int64_t* segments, float* parts, const TallForm form) {
    using namespace tall;
    constexpr int kUnrolled = kNarrow <= 64 ? 4 : 1, kAtOnce = kNarrow <= 32 ? 4 : 1;  // addresses take registers
    extern __shared__ __align__(128) unsigned char memory[];
    Element* stages = reinterpret_cast<Element*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wide_tiles = (form.wide.columns + kWide - 1) / kWide, chunk = blockIdx.x / wide_tiles;
    const int wide0 = blockIdx.x % wide_tiles * kWide, narrow0 = blockIdx.y * kNarrow;
    const TaskRows rows = rows_of_tile(chunk, form.chunk, segments, form.tasks, form.rows);
    if (rows.begin >= rows.end) return;

    const auto fetch_stage = [&](int number) {
        Element* stage = stages + number % kStages * kStage<kNarrow>;
        const int row0 = rows.begin + number * kRows;
        fetch<Element, kWide / 8, kAtOnce>(stage, wide, wide_index, form.wide, wide0, row0, rows.end);
        fetch<Element, kNarrow / 8, kAtOnce>(stage + kRows * kWide, narrow, narrow_index, form.narrow, narrow0, row0,
                                             rows.end);
    };
    const int steps = (rows.end - rows.begin + kRows - 1) / kRows;
    float sum[kNarrow / 8][4] = {};
    for (int ahead = 0; ahead < steps + kStages - 1; ++ahead) {
        const int number = ahead - (kStages - 1);
        if (number >= 0) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // this stage is there, and the one before has been read
        }
        if (ahead < steps) fetch_stage(ahead);
        end_copies();
        if (number < 0) continue;
        const Element* left = stages + number % kStages * kStage<kNarrow>;
        const Element* right = left + kRows * kWide;
#pragma unroll kUnrolled
        for (int row0 = 0; row0 < kRows; row0 += 16) {
            uint32_t a[4];  // wide columns g, g + 8 of rows 0 to 7, then of rows 8 to 15
            const int row = row0 + lane / 16 * 8 + lane % 8;
            load_4_matrices_transposed(a, left + place_of_piece<kWide / 8>(row, warp * 2 + lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < kNarrow / 16; ++n) {
                uint32_t b[4];  // rows 0 to 7, 8 to 15 of the first eight narrow columns, then of the second
                load_4_matrices_transposed(b, right + place_of_piece<kNarrow / 8>(row0 + lane % 16, n * 2 + lane / 16));
                multiply_16x8x16<Element>(sum[2 * n], a, b[0], b[1]);
                multiply_16x8x16<Element>(sum[2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    // Eight lanes write 32 bytes side by side where wide columns are adjacent, and four where narrow ones are.
    float* part = parts + static_cast<int64_t>(chunk) * form.wide.columns * form.narrow.columns;
    const bool in_pairs = form.narrow.step == 1 && form.narrow.columns % 2 == 0;
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int of_wide = wide0 + warp * 16 + lane / 4 + half * 8, of_narrow = narrow0 + n * 8 + lane % 4 * 2;
            if (of_wide >= form.wide.columns) continue;
            float* at = part + static_cast<int64_t>(of_wide) * form.wide.step +
                        static_cast<int64_t>(of_narrow) * form.narrow.step;
            if (in_pairs && of_narrow < form.narrow.columns) {
                *reinterpret_cast<float2*>(at) = make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
            } else {
                if (of_narrow < form.narrow.columns) at[0] = sum[n][2 * half];
                if (of_narrow + 1 < form.narrow.columns) at[form.narrow.step] = sum[n][2 * half + 1];
            }
        }
}

// The floor is the bytes of the parts, each read once by neighbours.
template <class Element>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* parts, const int64_t* segments, Element* out, const PartsForm form) {
    const int blocks = (form.count + blockDim.x - 1) / blockDim.x, task = blockIdx.x / blocks;
    const int i = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (i >= form.count) return;
    const TaskRows rows = rows_of_task(task, segments, form.rows);
    const float* part = parts + static_cast<int64_t>(first_tile_of(rows, form.chunk)) * form.size + form.first + i;
    const int count = (rows.end - rows.begin + form.chunk - 1) / form.chunk;
    float total = 0;
#pragma unroll 4
    for (int number = 0; number < count; ++number) total += part[static_cast<int64_t>(number) * form.size];
    out[static_cast<int64_t>(task) * form.count + i] = narrow<Element>(total);
}

}  // namespace cuda
}  // namespace tarp
