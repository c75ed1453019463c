// How tiles lie in shared memory.
#pragma once

namespace tarp {
namespace cuda {

// Where a piece of a row, eight numbers of two bytes, lies in a tile whose rows have kPieces (a power of two), in
// elements. Pieces of one number in eight rows that follow a multiple of eight, which is what a load of a matrix reads,
// lie in different banks, and so do the pieces of a row.
template <int kPieces>
__device__ __forceinline__ int place_of_piece(int row, int piece) {
    constexpr int kTogether = kPieces < 8 ? 8 / kPieces : 1;  // rows that fill the 32 banks
    return (row * kPieces + (piece ^ (row / kTogether % (8 / kTogether)))) * 8;
}

}  // namespace cuda
}  // namespace tarp
