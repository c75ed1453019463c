// Where a call's rows lie.
#pragma once

#include <stdint.h>

namespace tarp {
namespace cuda {

// Which row a call's row is, among `count`; what is no row number becomes one.
__device__ __forceinline__ int place_of(int token, const int64_t* index, int count) {
    if (index == nullptr) return token;
    const int64_t row = index[token];
    return static_cast<int>(row < 0 ? 0 : row < count ? row : count - 1);
}

}  // namespace cuda
}  // namespace tarp
