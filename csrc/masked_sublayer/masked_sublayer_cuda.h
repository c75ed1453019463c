// What the host hands to the CUDA kernels that gather a masked sublayer's rows and put its results back.
#pragma once

#include <cstdint>

namespace tarp {
namespace cuda {

// Rows are `pieces` pieces of 16, 4 or 2 bytes, and their strides are counted in pieces; tests write these numbers.
struct GatherForm {
    int count, total, pieces;  // T', rows of x, pieces of a row
    int x_row;
};

// out [count] = x[index]. Throws std::runtime_error where CUDA refuses, as below.
void gather_rows(int device, void* stream, int piece_bytes, const void* x, const int64_t* index, void* out,
                 const GatherForm& form);

struct ScatterForm {
    int count, total, pieces;  // T', rows of out, pieces of a row
    int base_row, values_row;
};

// out [total] = values in the rows that index [count] names and mask [total] marks, base in all others. Null base or
// values: zeros.
void scatter_rows(int device, void* stream, int piece_bytes, const void* base, const void* values, const int64_t* index,
                  const uint8_t* mask, void* out, const ScatterForm& form);

}  // namespace cuda
}  // namespace tarp
