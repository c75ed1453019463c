// The functions of a generator, one number at a time.
#pragma once

namespace tarp {
namespace cuda {

enum Activation { kNone, kOnePlus, kSigmoid, kTanh, kSoftplus, kRelu, kGelu, kSilu };

// The fast exponential, logarithm and quotient are off by 2⁻²¹, which half precision does not see.
__device__ __forceinline__ float sigmoid(float v) {
    return __fdividef(1, 1 + __expf(-v));
}

__device__ __forceinline__ float activate(int kind, float v) {
    switch (kind) {
        case kOnePlus:
            return 1 + v;
        case kSigmoid:
            return sigmoid(v);
        case kTanh:
            return tanhf(v);
        case kSoftplus:
            return fmaxf(v, 0.0f) + __logf(1 + __expf(-fabsf(v)));
        case kRelu:
            return fmaxf(v, 0.0f);
        case kGelu:
            return 0.5f * v * (1 + erff(v * 0.70710678f));
        case kSilu:
            return __fdividef(v, 1 + __expf(-v));
        default:
            return v;
    }
}

}  // namespace cuda
}  // namespace tarp
