// Starts the kernel of lowrank_linear for many rows on sm_90, the one architecture that this file is compiled for.
#include "common/cuda/runtime.cuh"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/many_rows_sm90_cuda.cuh"

namespace tarp {
namespace cuda {

namespace {

template <class Element, int kColumns>
void start(cudaStream_t stream, int tiles, const ManyRowsTensors& t, void* maps, const ManyRowsForm& form) {
    const auto kernel = &many_rows_sm90_kernel<Element, kColumns>;
    allow_shared_memory(kernel, many_sm90::kSharedBytes);
    const auto own_maps = static_cast<unsigned char*>(maps);
    tile_maps_kernel<<<1, many_sm90::kMapThreads, 0, stream>>>(t.x, t.weight, own_maps, kColumns, form);
    check(cudaGetLastError(), "the launch failed");
    const dim3 grid((form.out + kColumns - 1) / kColumns, tiles);
    kernel<<<grid, many_sm90::kBlockThreads, many_sm90::kSharedBytes, stream>>>(
        own_maps, static_cast<const Element*>(t.bias), static_cast<const Element*>(t.z),
        static_cast<const Element*>(t.U), t.segments, t.write, static_cast<Element*>(t.y), form);
    check(cudaGetLastError(), "the launch failed");
}

template <class Element>
void start(cudaStream_t stream, int tiles, bool wide, const ManyRowsTensors& tensors, void* maps,
           const ManyRowsForm& form) {
    if (wide)
        start<Element, 256>(stream, tiles, tensors, maps, form);
    else
        start<Element, 128>(stream, tiles, tensors, maps, form);
}

}  // namespace

void lowrank_linear_many_rows_sm90(const ManyRowsLaunch& launch, bool wide, const ManyRowsTensors& tensors, void* maps,
                                   const ManyRowsForm& form) {
    const CurrentDevice current(launch.device);
    const auto stream = static_cast<cudaStream_t>(launch.stream);
    if (launch.bf16)
        start<__nv_bfloat16>(stream, launch.tiles, wide, tensors, maps, form);
    else
        start<__half>(stream, launch.tiles, wide, tensors, maps, form);
}

}  // namespace cuda
}  // namespace tarp
