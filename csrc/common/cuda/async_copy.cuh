// Copies from global to shared memory that go on while the threads compute.
#pragma once

#include <stdint.h>

namespace tarp {
namespace cuda {

// 16 bytes, past the first-level cache; zeros where not `wanted`. `source` must be a valid address all the same.
__device__ __forceinline__ void copy_16(void* target, const void* source, bool wanted) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
        "l"(__cvta_generic_to_global(source)), "r"(wanted ? 16 : 0)
        : "memory");
}

// Ends a group of copies of this thread, which may be empty.
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same for a number that is known as the kernel runs, 0 to 6.
__device__ __forceinline__ void wait_for_copies_but(int pending) {
    switch (pending) {
        case 0:
            return wait_for_copies<0>();
        case 1:
            return wait_for_copies<1>();
        case 2:
            return wait_for_copies<2>();
        case 3:
            return wait_for_copies<3>();
        case 4:
            return wait_for_copies<4>();
        case 5:
            return wait_for_copies<5>();
        default:
            return wait_for_copies<6>();
    }
}

}  // namespace cuda
}  // namespace tarp
