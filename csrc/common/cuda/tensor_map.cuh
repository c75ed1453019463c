// Matrices of 16-bit elements that the copy engine knows: their descriptions, made on the GPU, and copies of boxes. A
// program that links no CUDA driver has nobody to make descriptions on the host. sm_90a.
#pragma once

#include <stdint.h>

#include "common/cuda/mbarrier.cuh"

namespace tarp {
namespace cuda {

constexpr int kMapBytes = 128;  // of a description, which starts at a multiple of as many
constexpr int kBoxDepth = 64;   // of a box: its rows are 128 bytes

// Describes matrix [rows, depth], rows of `row` elements, in boxes of `box_rows` (at most 256) by kBoxDepth. Row r of a
// box lies at 128 r bytes of shared memory, its piece p of 16 bytes in place p ^ r % 8; what is beyond the matrix is 0.
// `matrix` and its rows start at multiples of 16 bytes, rows do not overlap.
//
// `map` is 32 words of shared memory, the others of the warp likewise; all lanes. The description goes to `published`
// in global memory.
__device__ __forceinline__ void describe_matrix(uint32_t* map, void* published, const void* matrix, int rows, int depth,
                                                int row, int box_rows) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(map));
    map[threadIdx.x % 32] = 0;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(at),
                     "l"(__cvta_generic_to_global(matrix))
                     : "memory");
        // The first of its dimensions is the one of adjacent elements. Strides are bytes, and have none for it.
        asm volatile(
            "tensormap.replace.tile.rank.shared::cta.b1024.b32 [%0], 1;\n"  // less one
            "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;\n"
            "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %2;\n"
            "tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %3;\n"
            "tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%0], 0, %4;\n"
            "tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%0], 1, %5;\n"
            "tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%0], 0, 1;\n"
            "tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%0], 1, 1;\n"
            "tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%0], 1;\n"      // of 16 bits, whatever they mean
            "tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%0], 3;\n"  // over 128 bytes
            "tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%0], 0;\n"
            "tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%0], 0;" ::"r"(at),
            "r"(depth), "r"(rows), "l"(2 * static_cast<int64_t>(row)), "n"(kBoxDepth), "r"(box_rows)
            : "memory");
    }
    __syncwarp();
    asm volatile(
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
            __cvta_generic_to_global(published)),
        "r"(at)
        : "memory");
}

// Before this thread's first copy by a description that an earlier launch published.
__device__ __forceinline__ void acquire_map(const void* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(__cvta_generic_to_global(map))
                 : "memory");
}

// The box from element (row, depth) on, to a multiple of 1024 bytes; `barrier` counts its bytes. By one thread.
__device__ __forceinline__ void copy_box(void* target, const void* map, int row, int depth, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
        "l"(__cvta_generic_to_global(map)), "r"(depth), "r"(row), "r"(address_of(barrier))
        : "memory");
}

}  // namespace cuda
}  // namespace tarp
