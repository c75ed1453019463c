// Tiles of 64 x 64 numbers in shared memory: how they come there, and products of them by a block of 256 threads.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/tile.cuh"

namespace tarp {
namespace cuda {
namespace cell {

constexpr int kRows = 64, kWidth = 64;
constexpr int kThreads = 256;          // 2 x 4 warps make 32 x 16 of a product each
constexpr int kTile = kRows * kWidth;  // numbers
constexpr int kMostStages = 8;         // of a pipeline

// Where a number lies in a tile, in elements: rows are 128 bytes, and any eight that follow each other in different
// banks.
__device__ __forceinline__ int place(int row, int column) {
    return place_of_piece<8>(row, column / 8) + column % 8;
}

__device__ __forceinline__ int warp_row() {
    return threadIdx.x / 128 * 32;
}
__device__ __forceinline__ int warp_column() {
    return threadIdx.x / 32 % 4 * 16;
}

// This thread's part of a product: [m][n][i] is row warp_row() + 16 m + lane / 4 + 8 (i / 2) and column warp_column() +
// 8 n + 2 (lane % 4) + i % 2.
struct Sums {
    float at[2][2][4];

    __device__ __forceinline__ void fill(float value) {
        each([&](int, int, float& first, float& second) { first = second = value; });
    }

    // function(row, column, number there, its neighbour)
    template <class Function>
    __device__ __forceinline__ void each(Function function) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                    function(warp_row() + m * 16 + lane / 4 + i * 4, warp_column() + n * 8 + lane % 4 * 2, at[m][n][i],
                             at[m][n][i + 1]);
    }

    // Each number += that of its column.
    template <class OfColumn>
    __device__ __forceinline__ void add_to_columns(OfColumn of_column) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int column = warp_column() + n * 8 + threadIdx.x % 4 * 2;
            const float first = of_column(column), second = of_column(column + 1);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; i += 2) at[m][n][i] += first, at[m][n][i + 1] += second;
        }
    }

    // function(number, the other's number)
    template <class Function>
    __device__ __forceinline__ void with(const Sums& other, Function function) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) function(at[m][n][i], other.at[m][n][i]);
    }
};

// The row of the m-th of a left factor's 16 that this lane loads.
__device__ __forceinline__ int left_row(int m) {
    return warp_row() + m * 16 + threadIdx.x % 16;
}

// The rows of a left factor that this lane loads, one for each 16 of the warp.
template <class Element>
struct LeftRows {
    const Element* row[2];
    int exchange[2];
};

// The rows themselves.
template <class Element>
__device__ __forceinline__ LeftRows<Element> rows_of(const Element* tile) {
    return {{tile + left_row(0) * kWidth, tile + left_row(1) * kWidth}, {left_row(0) & 7, left_row(1) & 7}};
}

// A tile of these numbers, rounded.
template <class Element>
__device__ __forceinline__ void put(Element* tile, Sums& sums) {
    sums.each([&](int row, int column, float& first, float& second) {
        *reinterpret_cast<uint32_t*>(tile + place(row, column)) = pair(narrow<Element>(first), narrow<Element>(second));
    });
}

// sums += a · tile: this thread's own numbers, so nobody has to wait.
template <class Element>
__device__ __forceinline__ void add(Sums& sums, float a, const Element* tile) {
    sums.each([&](int row, int column, float& first, float& second) {
        const int at = place(row, column);
        first += a * widen(tile[at]), second += a * widen(tile[at + 1]);
    });
}

// sum += A B, or A Bᵀ where the tile holds B by columns: 64 deep.
template <class Element, bool kByColumns>
__device__ __forceinline__ void multiply(Sums& sum, const LeftRows<Element>& left, const Element* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kWidth; k += 16) {
        uint32_t right[4];  // k and k + 8 of the first eight columns, then of the second
        if (kByColumns)
            load_4_matrices(right, tile + place(warp_column() + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        else
            load_4_matrices_transposed(right, tile + place(k + lane % 16, warp_column() + lane / 16 * 8));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t rows[4];  // rows g, g + 8 of k, then of k + 8
            load_4_matrices(rows, left.row[m] + ((k / 8 + lane / 16) ^ left.exchange[m]) * 8);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply_16x8x16<Element>(sum.at[m][n], rows, right[n * 2], right[n * 2 + 1]);
        }
    }
}

// Rows [from, to) of a matrix of `columns` columns into a tile of kCount rows, zeros around them; `source` is row 0's,
// and need not be there. Rows that are multiples of 16 bytes come by copies that go on.
template <int kCount = kRows, class Element>
__device__ __forceinline__ void fetch(Element* tile, const Element* source, int64_t row_size, int from, int to,
                                      int columns, const Element* valid) {
    if (row_size % 8 == 0) {
#pragma unroll
        for (int row = threadIdx.x / 8; row < kCount; row += kThreads / 8) {
            const int column = threadIdx.x % 8 * 8;
            const bool inside = row >= from && row < to && column < columns;
            copy_16(tile + place(row, column), inside ? source + row * row_size + column : valid, inside);
        }
    } else {
        for (int i = threadIdx.x; i < kCount * kWidth; i += kThreads) {
            const int row = i / kWidth, column = i % kWidth;
            const bool inside = row >= from && row < to && column < columns;
            tile[place(row, column)] = inside ? source[row * row_size + column] : narrow<Element>(0);
        }
    }
}

// use(n, stage) for n = 0 .. steps - 1 in order, fetch(n, stage) up to stages - 1 of them before: stage = n % stages.
// What is fetched for a step is there for all threads; what follows the last step may overwrite it after a barrier.
template <class Fetch, class Use>
__device__ __forceinline__ void pipeline(int steps, int stages, Fetch fetch, Use use) {
    for (int n = 0; n < stages - 1; ++n) {
        if (n < steps) fetch(n, n);
        end_copies();
    }
    for (int n = 0, stage = 0; n < steps; ++n) {
        wait_for_copies_but(stages - 2);
        __syncthreads();  // this step's is there, and the stage of the one before is free
        const int free = stage == 0 ? stages - 1 : stage - 1;
        if (n + stages - 1 < steps) fetch(n + stages - 1, free);
        end_copies();
        use(n, stage);
        stage = stage == stages - 1 ? 0 : stage + 1;
    }
}

}  // namespace cell
}  // namespace cuda
}  // namespace tarp
