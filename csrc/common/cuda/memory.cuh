// Loads and copies by 16 bytes, and the two ways in which blocks of one launch wait for each other.
#pragma once

#include <stdint.h>

namespace tarp {
namespace cuda {

// 16 bytes that nobody will read again: they leave no trace in the first-level cache. Zeros where not `wanted`. What
// the launch itself writes must not be read so: the compiler may move it past any other access.
__device__ __forceinline__ uint4 load_16_once(const void* address, bool wanted) {
    uint4 value;
    asm("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;\n"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
        : "l"(__cvta_generic_to_global(address)), "r"(static_cast<uint32_t>(wanted)));
    return value;
}

// 16 bytes, or 2, where `wanted`: no thread of a warp takes another way than the others.
__device__ __forceinline__ void store_16(void* address, uint4 value, bool wanted) {
    asm volatile(
        "{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted st.global.v4.u32 [%4], {%0,%1,%2,%3}; }" ::"r"(
            value.x),
        "r"(value.y), "r"(value.z), "r"(value.w), "l"(__cvta_generic_to_global(address)),
        "r"(static_cast<uint32_t>(wanted))
        : "memory");
}
__device__ __forceinline__ void store_2(void* address, uint16_t value, bool wanted) {
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted st.global.u16 [%1], %0; }" ::"h"(value),
                 "l"(__cvta_generic_to_global(address)), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

// What another block wrote before it raised a count; the first-level cache may hold older bytes.
__device__ __forceinline__ float load_from_second_level(const float* address) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(__cvta_generic_to_global(address)) : "memory");
    return value;
}

// Everything the block wrote is visible to whoever sees the raised count. Called by all threads; returns to all of them
// the count before.
__device__ __forceinline__ uint32_t raise(uint32_t* count, uint32_t* shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *shared = atomicAdd(count, 1);
        __threadfence();
    }
    __syncthreads();
    return *shared;
}

// Waits, all threads, until the count is at least `target`; whoever raises it must run already.
__device__ __forceinline__ void wait_for(const uint32_t* count, uint32_t target) {
    if (threadIdx.x == 0) {
        uint32_t seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                         : "=r"(seen)
                         : "l"(__cvta_generic_to_global(count))
                         : "memory");
        } while (seen < target);
    }
    __syncthreads();
}

}  // namespace cuda
}  // namespace tarp
