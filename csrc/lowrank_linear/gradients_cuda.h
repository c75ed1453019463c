// What the host hands to the CUDA kernels that make an adapter's gradients, which are sums over rows.
#pragma once

#include <cstdint>

namespace tarp {
namespace cuda {

// One operand of a product over rows, [T, columns].
struct TallOperand {
    int columns, row, rows;  // row: elements from one to the next; rows: of the tensor, for the index
    int step;                // floats of a part from what one column gives to what the next does
    int whole;               // 1: columns and row are multiples of 8 and data of 16 bytes, so copies are of 16 bytes
};

// Everything about a product over rows that is not a tensor; tests write these 13 numbers byte by byte.
struct TallForm {
    TallOperand wide, narrow;
    int rows, tasks;
    int chunk;  // rows of a part
};

// wide, narrow are of one half precision; narrow null: one column of ones. segments [tasks + 1], null for one task. The
// call's row i is row wide_index[i] of wide; null: row i. parts [chunks][wide.columns · narrow.columns].
struct TallTensors {
    const void *wide, *narrow;
    const int64_t *wide_index, *narrow_index, *segments;
    float* parts;
};

// parts = wideᵀ narrow over the rows of each chunk, which has rows of one task. narrow_columns: those of a block, 16,
// 32, 64 or 128. Throws std::runtime_error where CUDA refuses.
void lowrank_linear_tall(int device, void* stream, bool bf16, int chunks, int narrow_columns,
                         const TallTensors& tensors, const TallForm& form);

// As above; tests write these 6 numbers.
struct PartsForm {
    int rows, tasks, chunk;
    int size, first, count;  // floats of a part, and which of them
};

// The dtype of a gradient.
enum class PartsOut { float32, bf16, fp16 };

// out [tasks, count] = the sum of [first, first + count) of each task's parts, in their order.
void lowrank_linear_add_parts(int device, void* stream, PartsOut kind, const float* parts, const int64_t* segments,
                              void* out, const PartsForm& form);

}  // namespace cuda
}  // namespace tarp
