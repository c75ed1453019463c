// Tiles of a call's rows, none of which has rows of two tasks.
#pragma once

#include <stdint.h>

namespace tarp {
namespace cuda {

// The rows [begin, end), all of one task.
struct TaskRows {
    int task, begin, end;
};

// Those of a task. Offsets on a GPU are not checked, so they are clamped to the rows that exist.
__device__ __forceinline__ TaskRows rows_of_task(int task, const int64_t* segments, int rows) {
    if (segments == nullptr) return {task, 0, rows};
    const auto clamped = [&](int64_t row) { return static_cast<int>(row < 0 ? 0 : row < rows ? row : rows); };
    return {task, clamped(segments[task]), clamped(segments[task + 1])};
}

// The number of a task's first tile: that leaves room for the ragged ends of those before, and rows / height + tasks
// tiles are enough whatever the segments are.
__device__ __forceinline__ int first_tile_of(const TaskRows& rows, int height) {
    return rows.begin / height + rows.task;
}

// Those of a tile; none for a tile that nobody needs.
__device__ __forceinline__ TaskRows rows_of_tile(int tile, int height, const int64_t* segments, int tasks, int rows) {
    int low = 0, high = tasks;  // the last task whose tiles start at or before this one
    while (high - low > 1) {
        const int half = (low + high) / 2;
        if (first_tile_of(rows_of_task(half, segments, rows), height) <= tile)
            low = half;
        else
            high = half;
    }
    const TaskRows own = rows_of_task(low, segments, rows);
    const int begin = own.begin + (tile - first_tile_of(own, height)) * height;
    return {low, begin, min(own.end, begin + height)};
}

}  // namespace cuda
}  // namespace tarp
