// y = x Wᵀ + b + z Uᵀ for many rows of x, z = scaling · Σ(x) x Vᵀ made before: a product on tensor cores whose last
// steps over the depth are z and U, so y is written once and rounded once.
//
// Operations: 2 T N (K + r). Bytes of a tile of 128 x 128: 2 · 256 · K in, so 64 operations a byte from the
// second-level cache, which feeds 5 TB/s on the larger GPUs: the tensor cores bind from there on. A stage is 32 deep
// and 16 KB; four of them hide the latency of a copy behind three steps of 16 products each.
//
// Eight warps, 2 x 4, make 64 x 32 each. Rows in shared memory are 64 bytes; their four pieces are exchanged so that
// the eight rows of a matrix lie in different banks.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/tile.cuh"
#include "lowrank_linear/many_rows_tiles_cuda.cuh"

namespace tarp {
namespace cuda {

namespace many {

constexpr int kTile = kRowTile, kDepth = 32, kStages = 4, kBlockThreads = 256;  // kTile: rows and columns
constexpr int kPieces = kDepth / 8;                                             // of 16 bytes, in a row
constexpr int kStage = 2 * kTile * kDepth;                                      // elements: a tile of x, then one of W
constexpr int kSharedBytes = kStages * kStage * 2;                              // y takes less

// sum += A Bᵀ of one stage: this warp's 64 x 32.
template <class Element>
__device__ __forceinline__ void step(float (&sum)[4][4][4], const Element* stage, int warp_row, int warp_column,
                                     int lane) {
    const Element *a = stage, *b = stage + kTile * kDepth;
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
        uint32_t right[2][4];  // two columns of eight rows of W each: k, k + 8 of the first, of the second
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int row = warp_column + n * 16 + lane / 16 * 8 + lane % 8;
            load_4_matrices(right[n], b + place_of_piece<kPieces>(row, k + lane / 8 % 2));
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            uint32_t left[4];  // rows g, g + 8 of k, then of k + 8
            load_4_matrices(left, a + place_of_piece<kPieces>(warp_row + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
            for (int n = 0; n < 4; ++n)
                multiply_16x8x16<Element>(sum[m][n], left, right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]);
        }
    }
}

}  // namespace many

template <class Element>
__global__ void __launch_bounds__(many::kBlockThreads)
    many_rows_kernel(const Element* x, const Element* weight, const Element* bias, const Element* z, const Element* U,
                     const int64_t* segments, const int64_t* read, const int64_t* write, Element* y,
                     const ManyRowsForm form) {
    using namespace many;
    extern __shared__ __align__(128) unsigned char memory[];
    Element* stages = reinterpret_cast<Element*>(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    const TaskRows rows = rows_of_tile(blockIdx.y, kTile, segments, form.tasks, form.rows);
    const int column0 = blockIdx.x * kTile, columns = min(kTile, form.out - column0), count = rows.end - rows.begin;
    if (count <= 0) return;

    // Every thread copies two pieces of x and two of W, 64 rows apart.
    const int own_row = thread / kPieces, piece = thread % kPieces;
    const Element* of_x[2];  // null beyond the tile
    const Element* of_W[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = own_row + i * 64;
        const int64_t at = row < count ? place_of(rows.begin + row, read, form.x_rows) : 0;
        of_x[i] = row < count ? x + at * form.x_row : nullptr;
        of_W[i] = row < columns ? weight + static_cast<int64_t>(column0 + row) * form.weight_row : nullptr;
    }
    const auto fetch = [&](int number) {
        Element* stage = stages + number % kStages * kStage;
        const int k = number * kDepth + piece * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = own_row + i * 64;
            const bool x_is = of_x[i] != nullptr && k < form.in, W_is = of_W[i] != nullptr && k < form.in;
            copy_16(stage + place_of_piece<kPieces>(row, piece), x_is ? of_x[i] + k : x, x_is);
            copy_16(stage + kTile * kDepth + place_of_piece<kPieces>(row, piece), W_is ? of_W[i] + k : weight, W_is);
        }
    };
    const int steps = (form.in + kDepth - 1) / kDepth;
    float sum[4][4][4] = {};
#pragma unroll
    for (int number = 0; number < kStages - 1; ++number) {
        if (number < steps) fetch(number);
        end_copies();
    }
    for (int number = 0; number < steps; ++number) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this stage is there, and the one before has been read
        if (number + kStages - 1 < steps) fetch(number + kStages - 1);
        end_copies();
        step<Element>(sum, stages + number % kStages * kStage, warp_row, warp_column, lane);
    }

    // z and U come element by element: r is any number.
    const Element* own_U = U + static_cast<int64_t>(rows.task) * form.out * form.rank;
    for (int from = 0; from < form.rank; from += kDepth) {
        __syncthreads();  // the last stage has been read
        for (int i = thread; i < kTile * kDepth; i += kBlockThreads) {
            const int row = i / kDepth, k = i % kDepth, place = place_of_piece<kPieces>(row, k / 8) + k % 8,
                      j = from + k;
            const bool of_z = row < count && j < form.rank, of_U = row < columns && j < form.rank;
            const Element zero = narrow<Element>(0);
            stages[place] = of_z ? z[static_cast<int64_t>(rows.begin + row) * form.rank + j] : zero;
            stages[kTile * kDepth + place] = of_U ? own_U[static_cast<int64_t>(column0 + row) * form.rank + j] : zero;
        }
        __syncthreads();  // z and U are there
        step<Element>(sum, stages, warp_row, warp_column, lane);
    }

    // y goes out by rows, through shared memory.
    __syncthreads();  // z and U have been read
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = warp_column + n * 8 + lane % 4 * 2 + i;
            const float shift = bias == nullptr || column >= columns ? 0 : widen(bias[column0 + column]);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + m * 16 + lane / 4 + half * 8;
                    stages[row * (kTile + kOutPad) + column] = narrow<Element>(sum[m][n][half * 2 + i] + shift);
                }
        }
    __syncthreads();  // y is there
    write_rows<kTile, kBlockThreads>(stages, y, rows, column0, write, form, thread);
}

}  // namespace cuda
}  // namespace tarp
