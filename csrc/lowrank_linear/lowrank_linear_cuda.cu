// Starts the CUDA kernels of lowrank_linear.
#include <stdexcept>
#include <string>

#include "common/cuda/runtime.cuh"
#include "lowrank_linear/few_rows_cuda.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/many_rows_cuda.cuh"

namespace tarp {
namespace cuda {

namespace {

template <class Element, int kTokenTiles>
void start(const FewRowsLaunch& launch, const FewRowsTensors& t, const FewRowsForm& form) {
    const auto kernel = &few_rows_kernel<Element, kTokenTiles>;
    allow_shared_memory(kernel, launch.shared_bytes);
    kernel<<<launch.blocks, kThreads, launch.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        static_cast<const Element*>(t.x), static_cast<const Element*>(t.weight), static_cast<const Element*>(t.bias),
        t.V, t.U, t.w1, t.b1, t.w2, t.b2, t.segments, t.read, t.write, t.scaling_at, static_cast<Element*>(t.y), t.h,
        t.s, t.u, t.partials, t.middle, t.counts, form);
    check(cudaGetLastError(), "the launch failed");
}

template <class Element>
void start(const FewRowsLaunch& launch, const FewRowsTensors& tensors, const FewRowsForm& form) {
    switch (launch.token_tiles) {
        case 1:
            return start<Element, 1>(launch, tensors, form);
        case 2:
            return start<Element, 2>(launch, tensors, form);
        case 4:
            return start<Element, 4>(launch, tensors, form);
        case 8:
            return start<Element, 8>(launch, tensors, form);
        default:
            throw std::invalid_argument("token_tiles: got " + std::to_string(launch.token_tiles) +
                                        ", expected 1, 2, 4 or 8");
    }
}

template <class Element>
void start(cudaStream_t stream, int tiles, const ManyRowsTensors& t, const ManyRowsForm& form) {
    const auto kernel = &many_rows_kernel<Element>;
    allow_shared_memory(kernel, many::kSharedBytes);
    const dim3 grid((form.out + many::kTile - 1) / many::kTile, tiles);
    kernel<<<grid, many::kBlockThreads, many::kSharedBytes, stream>>>(
        static_cast<const Element*>(t.x), static_cast<const Element*>(t.weight), static_cast<const Element*>(t.bias),
        static_cast<const Element*>(t.z), static_cast<const Element*>(t.U), t.segments, t.read, t.write,
        static_cast<Element*>(t.y), form);
    check(cudaGetLastError(), "the launch failed");
}

}  // namespace

void lowrank_linear_many_rows(const ManyRowsLaunch& launch, const ManyRowsTensors& tensors, const ManyRowsForm& form) {
    const CurrentDevice current(launch.device);
    if (launch.bf16)
        start<__nv_bfloat16>(static_cast<cudaStream_t>(launch.stream), launch.tiles, tensors, form);
    else
        start<__half>(static_cast<cudaStream_t>(launch.stream), launch.tiles, tensors, form);
}

void lowrank_linear_few_rows(const FewRowsLaunch& launch, const FewRowsTensors& tensors, const FewRowsForm& form) {
    const CurrentDevice current(launch.device);
    if (launch.bf16)
        start<__nv_bfloat16>(launch, tensors, form);
    else
        start<__half>(launch, tensors, form);
}

}  // namespace cuda
}  // namespace tarp
