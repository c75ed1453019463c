// Starts the CUDA kernels of lowrank_linear.
#include <stdexcept>
#include <string>

#include "common/cuda/runtime.cuh"
#include "lowrank_linear/few_rows_cuda.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"

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

}  // namespace

void lowrank_linear_few_rows(const FewRowsLaunch& launch, const FewRowsTensors& tensors, const FewRowsForm& form) {
    const CurrentDevice current(launch.device);
    if (launch.bf16)
        start<__nv_bfloat16>(launch, tensors, form);
    else
        start<__half>(launch, tensors, form);
}

}  // namespace cuda
}  // namespace tarp
