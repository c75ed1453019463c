#include "common/isa_probe.h"

namespace tarp::TARP_ISA {

IsaProbe compiled_with() {
#if defined(__AVX512F__)
    const int vector_bytes = 64;
#elif defined(__AVX__)
    const int vector_bytes = 32;
#else
    const int vector_bytes = 16;
#endif
#if defined(__FMA__)
    const bool fma = true;
#else
    const bool fma = false;
#endif
#if defined(__AVX512BF16__)
    const bool bf16_dot = true;
#else
    const bool bf16_dot = false;
#endif
    return {vector_bytes, fma, bf16_dot};
}

}  // namespace tarp::TARP_ISA
