// Starts the CUDA kernels of search_cell.
#include <tuple>
#include <utility>

#include "common/cuda/runtime.cuh"
#include "search_cell/search_cell_backward_cuda.cuh"
#include "search_cell/search_cell_cuda.h"
#include "search_cell/search_cell_forward_cuda.cuh"
#include "search_cell/search_cell_gradients_cuda.cuh"

namespace tarp {
namespace cuda {

namespace {

// kernel(tensors..., others...): every address as what the kernel takes it for.
template <class... Parameters, size_t kCount, size_t... kIndex, class... Others>
void start(const CellLaunch& launch, dim3 grid, void (*kernel)(Parameters...),
           const std::array<uintptr_t, kCount>& tensors, std::index_sequence<kIndex...>, Others... others) {
    const CurrentDevice current(launch.device);
    allow_shared_memory(kernel, launch.shared_bytes);
    kernel<<<grid, cell::kThreads, launch.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        reinterpret_cast<std::tuple_element_t<kIndex, std::tuple<Parameters...>>>(tensors[kIndex])..., others...);
    check(cudaGetLastError(), "the launch failed");
}

template <class Kernel, size_t kCount, class... Others>
void start(const CellLaunch& launch, dim3 grid, Kernel kernel, const std::array<uintptr_t, kCount>& tensors,
           Others... others) {
    start(launch, grid, kernel, tensors, std::make_index_sequence<kCount>(), others...);
}

}  // namespace

void search_cell_forward(const CellLaunch& launch, const CellPointers<20>& tensors, const CellForm& form) {
    if (launch.bf16)
        start(launch, launch.blocks, &search_cell_forward_kernel<__nv_bfloat16>, tensors, form);
    else
        start(launch, launch.blocks, &search_cell_forward_kernel<__half>, tensors, form);
}

void search_cell_backward(const CellLaunch& launch, const CellPointers<26>& tensors, const CellForm& form) {
    if (launch.bf16)
        start(launch, launch.blocks, &search_cell_backward_kernel<__nv_bfloat16>, tensors, form);
    else
        start(launch, launch.blocks, &search_cell_backward_kernel<__half>, tensors, form);
}

void search_cell_gradients(const CellLaunch& launch, const CellPointers<7>& tensors, int slots, int size,
                           const CellForm& form) {
    const dim3 grid(launch.blocks, slots);
    if (launch.bf16)
        start(launch, grid, &search_cell_gradients_kernel<__nv_bfloat16>, tensors, size, form);
    else
        start(launch, grid, &search_cell_gradients_kernel<__half>, tensors, size, form);
}

void search_cell_add(const CellLaunch& launch, const CellPointers<11>& tensors, int slots, int tasks, int width,
                     int size, bool wide) {
    const dim3 grid(launch.blocks, slots, tasks);
    if (wide)
        start(launch, grid, &search_cell_add_kernel<float>, tensors, width, size);
    else if (launch.bf16)
        start(launch, grid, &search_cell_add_kernel<__nv_bfloat16>, tensors, width, size);
    else
        start(launch, grid, &search_cell_add_kernel<__half>, tensors, width, size);
}

}  // namespace cuda
}  // namespace tarp
