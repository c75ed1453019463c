#include "lowrank_linear/lowrank_linear.h"

#include "common/cpu_features.h"

namespace tarp {

// The parts of Workspace in lowrank_linear_cpu.cpp.
int64_t backward_workspace(const LowrankLinear& op) {
    const int64_t tasks = op.segments == nullptr ? 1 : op.tasks;
    const int64_t mlp = op.w2 == nullptr ? 0 : op.outputs + op.first;
    const Factor& factor = op.factor;
    const int64_t sums = factor.P == nullptr ? 0 : factor.units() * factor.out * factor.rank + factor.rank * factor.in;
    return op.rows * (2 * op.rank + op.first + mlp) + 2 * tasks * op.rank * op.out + sums;
}

#define TARP_FORWARD(isa) \
    case Isa::isa:        \
        return isa::lowrank_linear_forward(op, io);
#define TARP_BACKWARD(isa) \
    case Isa::isa:         \
        return isa::lowrank_linear_backward(op, io);

void lowrank_linear_forward(const LowrankLinear& op, const LowrankLinearForward& io) {
    switch (active_isa()) { TARP_BUILT_ISAS(TARP_FORWARD) }
}

void lowrank_linear_backward(const LowrankLinear& op, const LowrankLinearBackward& io) {
    switch (active_isa()) { TARP_BUILT_ISAS(TARP_BACKWARD) }
}

}  // namespace tarp
