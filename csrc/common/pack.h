// Operands as they lie in memory, and the two ways the kernels read them: as packed panels and as float rows.
#pragma once

#include "common/philox.h"
#include "common/tile.h"

namespace tarp {
namespace TARP_ISA {

TARP_INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Whether the rows [i, i + count) that an index names lie one after the other; it rises, so its ends tell.
TARP_INLINE bool in_a_run(const int64_t* index, int64_t i, int64_t count) {
    return index == nullptr || index[i + count - 1] - index[i] == count - 1;
}

// A matrix of float32 or bfloat16 elements with any strides (counted in elements).
struct Operand {
    const char* data;
    int64_t row, column;
    bool bf16;
    const int64_t* index = nullptr;  // its rows are these ones in memory, strictly rising; null: row i is row i

    TARP_INLINE int64_t element() const { return bf16 ? 2 : 4; }
    TARP_INLINE const char* at(int64_t i, int64_t j) const {
        return data + ((index == nullptr ? i : index[i]) * row + j * column) * element();
    }
    TARP_INLINE float value(int64_t i, int64_t j) const {
        const char* p = at(i, j);
        if (bf16) {
            uint16_t bits;
            memcpy(&bits, p, sizeof bits);
            return widen(bits);
        }
        float value;
        memcpy(&value, p, sizeof value);
        return value;
    }
};

// Float rows: a view of the operand where it holds floats `stride` apart, else of a converted copy.
struct FloatRows {
    const float* data;
    int64_t stride;
};

// Rows [row, row + rows) and columns [column, column + columns) of a matrix with adjacent columns as floats. `buffer`
// holds rows · columns floats. With dropout each element is multiplied by its factor, counted over rows of `width`.
inline FloatRows as_floats(const Operand& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           float* buffer, const Dropout& dropout, int64_t width) {
    if (!matrix.bf16 && dropout.threshold == 0 && in_a_run(matrix.index, row, rows))
        return {reinterpret_cast<const float*>(matrix.at(row, column)), matrix.row};
    for (int64_t i = 0; i < rows; ++i) {
        const char* source = matrix.at(row + i, column);
        float* target = buffer + i * columns;
        if (matrix.bf16)
            widen_row(reinterpret_cast<const uint16_t*>(source), columns, target);
        else
            memcpy(target, source, static_cast<size_t>(columns) * sizeof(float));
        if (dropout.threshold != 0) {
            const uint64_t first = static_cast<uint64_t>((row + i) * width + column);
            for (int64_t j = 0; j < columns; ++j) target[j] *= dropout.factor(first + static_cast<uint64_t>(j));
        }
    }
    return {buffer, columns};
}

// target [columns, rows] = aᵀ for a [rows, columns], each of rows `a_row` and `target_row` floats apart.
inline void transpose(const float* a, int64_t rows, int64_t columns, int64_t a_row, float* target, int64_t target_row) {
    const int64_t whole_rows = rows / kSquare * kSquare, whole_columns = columns / kSquare * kSquare;
    for (int64_t i = 0; i < whole_rows; i += kSquare)
        for (int64_t j = 0; j < whole_columns; j += kSquare)
            transpose_square(reinterpret_cast<const char*>(a + i * a_row + j), a_row * 4,
                             reinterpret_cast<uint32_t*>(target + j * target_row + i), target_row);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
            target[j * target_row + i] = a[i * a_row + j];
}

// Columns [column, column + columns) of B [depth, N] as a panel [depth][kColumns] of floats, zeros beyond `columns`.
inline void pack(const Operand& b, int64_t depth, int64_t column, int64_t columns, float* panel) {
    if (columns < kColumns) memset(panel, 0, static_cast<size_t>(depth * kColumns) * sizeof(float));
    if (b.row == 1 && !b.bf16) {  // adjacent in depth: transpose squares
        const int64_t squares = depth / kSquare * kSquare;
        int64_t n = 0;
        for (; n + kSquare <= columns; n += kSquare)
            for (int64_t k = 0; k < squares; k += kSquare)
                transpose_square(b.at(k, column + n), b.column * 4,
                                 reinterpret_cast<uint32_t*>(panel) + k * kColumns + n, kColumns);
        for (int64_t k = squares; k < depth; ++k)
            for (int64_t i = 0; i < n; ++i) panel[k * kColumns + i] = b.value(k, column + i);
        for (; n < columns; ++n)
            for (int64_t k = 0; k < depth; ++k) panel[k * kColumns + n] = b.value(k, column + n);
        return;
    }
    for (int64_t k = 0; k < depth; ++k) {
        float* target = panel + k * kColumns;
        if (b.column != 1)
            for (int64_t n = 0; n < columns; ++n) target[n] = b.value(k, column + n);
        else if (b.bf16)
            widen_row(reinterpret_cast<const uint16_t*>(b.at(k, column)), columns, target);
        else if (columns == kColumns)
            memcpy(target, b.at(k, column), kColumns * sizeof(float));
        else
            memcpy(target, b.at(k, column), static_cast<size_t>(columns) * sizeof(float));
    }
}

// The same as a panel [⌈depth / 2⌉][kColumns] of bfloat16 pairs that are adjacent in depth.
inline void pack(const Operand& b, int64_t depth, int64_t column, int64_t columns, uint32_t* panel) {
    const int64_t pairs = (depth + 1) / 2;
    if (columns < kColumns) memset(panel, 0, static_cast<size_t>(pairs * kColumns) * sizeof(uint32_t));
    const auto bits = [&](int64_t k, int64_t n) -> uint32_t {
        if (k >= depth) return 0;
        uint16_t value;
        memcpy(&value, b.at(k, column + n), sizeof value);
        return value;
    };
    int64_t n = 0, k = 0;  // done: columns below n and pairs below k
    if (b.row == 1) {
        k = depth / 2 / kSquare * kSquare;
        for (; n + kSquare <= columns; n += kSquare)
            for (int64_t i = 0; i < k; i += kSquare)
                transpose_square(b.at(2 * i, column + n), b.column * 2, panel + i * kColumns + n, kColumns);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = n; j < columns; ++j) panel[i * kColumns + j] = bits(2 * i, j) | bits(2 * i + 1, j) << 16;
    }
    for (; k < pairs; ++k) {
        uint32_t* target = panel + k * kColumns;
        if (b.column == 1 && 2 * k + 1 < depth) {
            const uint16_t* even = reinterpret_cast<const uint16_t*>(b.at(2 * k, column));
            const uint16_t* odd = reinterpret_cast<const uint16_t*>(b.at(2 * k + 1, column));
            for (int64_t j = 0; j < columns; ++j) target[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
        } else {
            for (int64_t j = 0; j < columns; ++j) target[j] = bits(2 * k, j) | bits(2 * k + 1, j) << 16;
        }
    }
}

}  // namespace TARP_ISA
}  // namespace tarp
