// The adapter's tensors, which are float32 or of x's half precision.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"

namespace tarp {
namespace cuda {

// A tensor that is float32 or Element, or none, which reads as zeros.
template <class Element>
struct Adapter {
    const void* data;
    bool wide;

    __device__ __forceinline__ float operator[](int64_t i) const {
        if (data == nullptr) return 0;
        return wide ? static_cast<const float*>(data)[i] : widen(static_cast<const Element*>(data)[i]);
    }
};

// Eight numbers of a row from element k on, as 16 bytes of Element.
template <class Element, bool kWide>
__device__ __forceinline__ uint4 load_8(const void* row, int k, bool wanted) {
    if (!kWide) return load_16_once(static_cast<const Element*>(row) + k, wanted);
    const float* from = static_cast<const float*>(row) + k;
    const uint4 low = load_16_once(from, wanted), high = load_16_once(from + 4, wanted);
    const auto two = [](uint32_t a, uint32_t b) {
        return pair(narrow<Element>(__uint_as_float(a)), narrow<Element>(__uint_as_float(b)));
    };
    return make_uint4(two(low.x, low.y), two(low.z, low.w), two(high.x, high.y), two(high.z, high.w));
}

}  // namespace cuda
}  // namespace tarp
