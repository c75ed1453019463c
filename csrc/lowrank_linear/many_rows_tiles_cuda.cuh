// What the kernels for many rows share: the rows of a tile, and how its y leaves.
#pragma once

#include "common/cuda/matrix.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/places_cuda.cuh"

namespace tarp {
namespace cuda {

constexpr int kRowTile = 128;
constexpr int kOutPad = 8;  // elements: rows of y on its way out start four banks apart

// The rows [begin, end) that a tile has, all of one task.
struct Rows {
    int task, begin, end;
};

// Tasks take their tiles one after the other; a tile beyond the last one is empty.
__device__ __forceinline__ Rows rows_of(int tile, const int64_t* segments, int tasks, int rows) {
    if (segments == nullptr) return {0, min(rows, tile * kRowTile), min(rows, (tile + 1) * kRowTile)};
    for (int task = 0; task < tasks; ++task) {
        const int begin = static_cast<int>(segments[task]), end = static_cast<int>(segments[task + 1]);
        const int tiles = (end - begin + kRowTile - 1) / kRowTile;
        if (tile < tiles) return {task, begin + tile * kRowTile, min(end, begin + (tile + 1) * kRowTile)};
        tile -= tiles;
    }
    return {0, 0, 0};
}

// y of a tile, from columns `column0` on, goes out by rows from shared memory, by kThreads threads.
template <int kColumns, int kThreads, class Element>
__device__ __forceinline__ void write_rows(const Element* tile, Element* y, const Rows& rows, int column0,
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
