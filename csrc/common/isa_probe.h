// What the compiler was told for each instruction set: lets a test and `tarp doctor` see that the flags arrived.
#pragma once

#include "built_isas.h"

namespace tarp {

struct IsaProbe {
    int vector_bytes;  // width of the widest float vector register
    bool fma;
    bool bf16_dot;  // bfloat16 dot product instruction
};

#define TARP_DECLARE(isa)     \
    namespace isa {           \
    IsaProbe compiled_with(); \
    }
TARP_BUILT_ISAS(TARP_DECLARE)
#undef TARP_DECLARE

}  // namespace tarp
