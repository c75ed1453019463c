// Starts the CUDA kernels that gather a masked sublayer's rows and put its results back.
#include <stdexcept>
#include <string>

#include "common/cuda/runtime.cuh"
#include "masked_sublayer/masked_sublayer_cuda.cuh"
#include "masked_sublayer/masked_sublayer_cuda.h"

namespace tarp {
namespace cuda {

namespace {

int blocks_of(int rows) {
    return (rows + masked::kRows - 1) / masked::kRows;
}

template <class Piece>
void start(cudaStream_t stream, const void* x, const int64_t* index, void* out, const GatherForm& form) {
    gather_rows_kernel<Piece><<<blocks_of(form.count), masked::kBlockThreads, 0, stream>>>(
        static_cast<const Piece*>(x), index, static_cast<Piece*>(out), form);
}

template <class Piece>
void start(cudaStream_t stream, const void* base, const void* values, const int64_t* index, const uint8_t* mask,
           void* out, const ScatterForm& form) {
    scatter_rows_kernel<Piece><<<blocks_of(form.count) + blocks_of(form.total), masked::kBlockThreads, 0, stream>>>(
        static_cast<const Piece*>(base), static_cast<const Piece*>(values), index, mask, static_cast<Piece*>(out),
        form);
}

template <class... Arguments>
void start_of_pieces(int device, void* stream, int piece_bytes, const Arguments&... arguments) {
    const CurrentDevice current(device);
    const auto in_stream = static_cast<cudaStream_t>(stream);
    switch (piece_bytes) {
        case 16:
            start<uint4>(in_stream, arguments...);
            break;
        case 4:
            start<uint32_t>(in_stream, arguments...);
            break;
        case 2:
            start<uint16_t>(in_stream, arguments...);
            break;
        default:
            throw std::invalid_argument("piece_bytes: got " + std::to_string(piece_bytes) + ", expected 16, 4 or 2");
    }
    check(cudaGetLastError(), "the launch failed");
}

}  // namespace

void gather_rows(int device, void* stream, int piece_bytes, const void* x, const int64_t* index, void* out,
                 const GatherForm& form) {
    start_of_pieces(device, stream, piece_bytes, x, index, out, form);
}

void scatter_rows(int device, void* stream, int piece_bytes, const void* base, const void* values, const int64_t* index,
                  const uint8_t* mask, void* out, const ScatterForm& form) {
    start_of_pieces(device, stream, piece_bytes, base, values, index, mask, out, form);
}

}  // namespace cuda
}  // namespace tarp
