// Rows of a matrix gathered, and put back beside those that stay: copies of bytes, whatever they mean.
//
// The floor is these bytes: each row that is wanted is read once, each row of the result is written once, also where
// rows are put back: selected rows are not first written as they were. Operations: none. A warp copies a row, four
// pieces of a lane under way, 2 KB.
#pragma once

#include "common/cuda/memory.cuh"
#include "lowrank_linear/places_cuda.cuh"
#include "masked_sublayer/masked_sublayer_cuda.h"

namespace tarp {
namespace cuda {

namespace masked {

constexpr int kBlockThreads = 256, kRows = kBlockThreads / 32;  // rows of a block

template <class Piece>
__device__ __forceinline__ Piece load_once(const Piece* from) {
    return *from;
}
template <>
__device__ __forceinline__ uint4 load_once<uint4>(const uint4* from) {
    return load_16_once(from, true);
}

// One row by a warp; null: zeros.
template <class Piece>
__device__ __forceinline__ void copy_row(Piece* to, const Piece* from, int pieces) {
    constexpr int kAhead = 4;
    for (int begin = threadIdx.x % 32; begin < pieces; begin += 32 * kAhead) {
        Piece held[kAhead] = {};
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (from != nullptr && begin + 32 * i < pieces) held[i] = load_once(from + begin + 32 * i);
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (begin + 32 * i < pieces) to[begin + 32 * i] = held[i];
    }
}

}  // namespace masked

template <class Piece>
__global__ void __launch_bounds__(masked::kBlockThreads)
    gather_rows_kernel(const Piece* x, const int64_t* index, Piece* out, const GatherForm form) {
    using namespace masked;
    __shared__ int places[kRows];
    const int first = blockIdx.x * kRows, own = threadIdx.x / 32, row = first + own;
    if (threadIdx.x < kRows && first + threadIdx.x < form.count)
        places[threadIdx.x] = place_of(first + threadIdx.x, index, form.total);
    __syncthreads();  // the places are there
    if (row < form.count)
        copy_row(out + static_cast<int64_t>(row) * form.pieces, x + static_cast<int64_t>(places[own]) * form.x_row,
                 form.pieces);
}

// Blocks of the first kind take rows of values, whose places are known; those after them all rows of base, and leave
// out what is selected.
template <class Piece>
__global__ void __launch_bounds__(masked::kBlockThreads)
    scatter_rows_kernel(const Piece* base, const Piece* values, const int64_t* index, const uint8_t* mask, Piece* out,
                        const ScatterForm form) {
    using namespace masked;
    __shared__ int places[kRows];  // of rows in out, or -1
    const int of_values = (form.count + kRows - 1) / kRows;
    const bool puts = blockIdx.x < of_values;
    const int first = (puts ? blockIdx.x : blockIdx.x - of_values) * kRows, end = puts ? form.count : form.total;
    if (threadIdx.x < kRows) {
        const int row = first + threadIdx.x;
        places[threadIdx.x] = row >= end ? -1 : puts ? place_of(row, index, form.total) : mask[row] != 0 ? -1 : row;
    }
    __syncthreads();  // the places are there
    const int own = threadIdx.x / 32, place = places[own];
    if (place < 0) return;
    const Piece* matrix = puts ? values : base;
    const int64_t at = static_cast<int64_t>(first + own) * (puts ? form.values_row : form.base_row);
    copy_row(out + static_cast<int64_t>(place) * form.pieces, matrix == nullptr ? nullptr : matrix + at, form.pieces);
}

}  // namespace cuda
}  // namespace tarp
