// Starts the CUDA kernels that make an adapter's gradients.
#include <stdexcept>
#include <string>

#include "common/cuda/runtime.cuh"
#include "lowrank_linear/gradients_cuda.cuh"
#include "lowrank_linear/gradients_cuda.h"

namespace tarp {
namespace cuda {

namespace {

template <class Element, int kNarrow>
void start(cudaStream_t stream, int chunks, const TallTensors& t, const TallForm& form) {
    const auto kernel = &tall_kernel<Element, kNarrow>;
    allow_shared_memory(kernel, tall::kSharedBytes<kNarrow>);
    const int wide_tiles = (form.wide.columns + tall::kWide - 1) / tall::kWide;
    const dim3 grid(wide_tiles * chunks, (form.narrow.columns + kNarrow - 1) / kNarrow);
    kernel<<<grid, tall::kBlockThreads, tall::kSharedBytes<kNarrow>, stream>>>(
        static_cast<const Element*>(t.wide), static_cast<const Element*>(t.narrow), t.wide_index, t.narrow_index,
        t.segments, t.parts, form);
    check(cudaGetLastError(), "the launch failed");
}

template <class Element>
void start(cudaStream_t stream, int chunks, int narrow_columns, const TallTensors& tensors, const TallForm& form) {
    switch (narrow_columns) {
        case 16:
            return start<Element, 16>(stream, chunks, tensors, form);
        case 32:
            return start<Element, 32>(stream, chunks, tensors, form);
        case 64:
            return start<Element, 64>(stream, chunks, tensors, form);
        case 128:
            return start<Element, 128>(stream, chunks, tensors, form);
        default:
            throw std::invalid_argument("narrow_columns: got " + std::to_string(narrow_columns) +
                                        ", expected 16, 32, 64 or 128");
    }
}

template <class Element>
void start(cudaStream_t stream, const float* parts, const int64_t* segments, void* out, const PartsForm& form) {
    constexpr int kBlockThreads = 256;
    const int blocks = (form.count + kBlockThreads - 1) / kBlockThreads * form.tasks;
    add_parts_kernel<Element><<<blocks, kBlockThreads, 0, stream>>>(parts, segments, static_cast<Element*>(out), form);
    check(cudaGetLastError(), "the launch failed");
}

}  // namespace

void lowrank_linear_tall(int device, void* stream, bool bf16, int chunks, int narrow_columns,
                         const TallTensors& tensors, const TallForm& form) {
    const CurrentDevice current(device);
    if (bf16)
        start<__nv_bfloat16>(static_cast<cudaStream_t>(stream), chunks, narrow_columns, tensors, form);
    else
        start<__half>(static_cast<cudaStream_t>(stream), chunks, narrow_columns, tensors, form);
}

void lowrank_linear_add_parts(int device, void* stream, PartsOut kind, const float* parts, const int64_t* segments,
                              void* out, const PartsForm& form) {
    const CurrentDevice current(device);
    switch (kind) {
        case PartsOut::float32:
            return start<float>(static_cast<cudaStream_t>(stream), parts, segments, out, form);
        case PartsOut::bf16:
            return start<__nv_bfloat16>(static_cast<cudaStream_t>(stream), parts, segments, out, form);
        case PartsOut::fp16:
            return start<__half>(static_cast<cudaStream_t>(stream), parts, segments, out, form);
    }
}

}  // namespace cuda
}  // namespace tarp
