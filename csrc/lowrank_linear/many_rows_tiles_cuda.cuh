// What the kernels for many rows share: how the y of a tile leaves.
#pragma once

#include "common/cuda/matrix.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/places_cuda.cuh"
#include "lowrank_linear/row_tiles_cuda.cuh"

namespace tarp {
namespace cuda {

constexpr int kRowTile = 128;
constexpr int kOutPad = 8;  // elements: rows of y on its way out start four banks apart

// y of a tile, from columns `column0` on, goes out by rows from shared memory, by kThreads threads.
template <int kColumns, int kThreads, class Element>
__device__ __forceinline__ void write_rows(const Element* tile, Element* y, const TaskRows& rows, int column0,
                                           const int64_t* write, const ManyRowsForm& form, int thread) {
    const int columns = min(kColumns, form.out - column0), count = rows.end - rows.begin;
    const auto row_of_y = [&](int row) {
        return y + static_cast<int64_t>(place_of(rows.begin + row, write, form.y_rows)) * form.out + column0;
    };
    if (form.out % 8 == 0) {
        for (int i = thread; i < count * (kColumns / 8); i += kThreads) {
            const int row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
            if (column < columns)
                *reinterpret_cast<uint4*>(row_of_y(row) + column) =
                    *reinterpret_cast<const uint4*>(tile + row * (kColumns + kOutPad) + column);
        }
    } else {
        for (int i = thread; i < count * kColumns; i += kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            if (column < columns) row_of_y(row)[column] = tile[row * (kColumns + kOutPad) + column];
        }
    }
}

}  // namespace cuda
}  // namespace tarp
