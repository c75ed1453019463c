// Starts the CUDA kernel that makes z for many rows.
#include <stdexcept>
#include <string>

#include "common/cuda/runtime.cuh"
#include "lowrank_linear/skinny_cuda.cuh"
#include "lowrank_linear/skinny_cuda.h"

namespace tarp {
namespace cuda {

namespace {

template <class Element, int kColumns>
void start(cudaStream_t stream, int tiles, const SkinnyTensors& t, const SkinnyForm& form) {
    const auto kernel = &skinny_kernel<Element, kColumns>;
    allow_shared_memory(kernel, skinny::kSharedBytes<kColumns>);
    kernel<<<dim3(tiles, form.splits), skinny::kBlockThreads, skinny::kSharedBytes<kColumns>, stream>>>(
        static_cast<const Element*>(t.x), t.V, t.w1, t.b1, t.w2, t.b2, t.segments, t.read, t.scaling_at,
        static_cast<Element*>(t.z), t.h, t.s, t.u, t.partials, t.counts, form);
    check(cudaGetLastError(), "the launch failed");
}

template <class Element>
void start(cudaStream_t stream, int tiles, int columns, const SkinnyTensors& tensors, const SkinnyForm& form) {
    switch (columns) {
        case 16:
            return start<Element, 16>(stream, tiles, tensors, form);
        case 32:
            return start<Element, 32>(stream, tiles, tensors, form);
        case 64:
            return start<Element, 64>(stream, tiles, tensors, form);
        case 128:
            return start<Element, 128>(stream, tiles, tensors, form);
        default:
            throw std::invalid_argument("columns: got " + std::to_string(columns) + ", expected 16, 32, 64 or 128");
    }
}

}  // namespace

void lowrank_linear_skinny(int device, void* stream, bool bf16, int tiles, int columns, const SkinnyTensors& tensors,
                           const SkinnyForm& form) {
    const CurrentDevice current(device);
    if (bf16)
        start<__nv_bfloat16>(static_cast<cudaStream_t>(stream), tiles, columns, tensors, form);
    else
        start<__half>(static_cast<cudaStream_t>(stream), tiles, columns, tensors, form);
}

}  // namespace cuda
}  // namespace tarp
