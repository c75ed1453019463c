// Barriers in shared memory that count arrivals and the bytes of copies, and barriers of a part of a block. sm_90.
#pragma once

#include <stdint.h>

namespace tarp {
namespace cuda {

__device__ __forceinline__ uint32_t address_of(const uint64_t* barrier) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}

// A phase ends with `arrivals` of them and with all bytes that these expect. By one thread, which then calls
// show_to_copies, all before a barrier of the block.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

// The phase ends no earlier than copies have brought so many bytes more.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended: 0 is that of the first, third, ... phase. It must be the present phase or
// the one before.
__device__ __forceinline__ void wait_for_phase(const uint64_t* barrier, int parity) {
    uint32_t ended;
    do {
        asm volatile(
            "{ .reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended; }"
            : "=r"(ended)
            : "r"(address_of(barrier)), "r"(parity)
            : "memory");
    } while (ended == 0);
}

// What this thread wrote to shared memory is visible to copies and products that read or write it asynchronously, once
// a barrier has told them.
__device__ __forceinline__ void show_to_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of kThreads threads, whole warps, whose lanes may have taken different ways. Numbers are 1 to 15, 0 is that
// of __syncthreads.
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_warps() {
    __syncwarp();
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

}  // namespace cuda
}  // namespace tarp
