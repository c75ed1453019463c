// Philox4x32-10 (Salmon et al., SC 2011), first word only: the bits behind seeded dropout. The same numbers as
// tarp_kernels/ops/philox.py.
#pragma once

#include <stdint.h>

namespace tarp {
namespace TARP_ISA {

struct Dropout {
    uint64_t threshold = 0;  // a 32-bit word below this drops the element; 0: no dropout
    uint64_t seed = 0;
    float scale = 1;  // 1 / (1 - p)

    // What element `index` is multiplied by: 0 or scale.
    inline float factor(uint64_t index) const {
        uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return c0 < threshold ? 0.0f : scale;
    }
};

}  // namespace TARP_ISA
}  // namespace tarp
