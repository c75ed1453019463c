// What the lanes of a warp tell each other; all 32 call.
#pragma once

namespace tarp {
namespace cuda {

// The sum over kLanes neighbours, a power of two, to all of them.
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ int sum_up_to_lane(int value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffff, value, distance);
        if (static_cast<int>(threadIdx.x) % 32 >= distance) value += before;
    }
    return value;
}

// What a lane has.
__device__ __forceinline__ int of_lane(int value, int lane) {
    return __shfl_sync(0xffffffff, value, lane);
}

}  // namespace cuda
}  // namespace tarp
