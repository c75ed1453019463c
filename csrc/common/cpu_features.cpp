#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace tarp {
namespace {

// One function per instruction set, named like it, because the list of those that are built is a macro.
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
namespace runs {
bool plain() {
    return true;
}
#if defined(__x86_64__)
bool avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool avx512bf16() {
    return avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif
}  // namespace runs

bool usable(Isa isa) {
    switch (isa) {
#define TARP_CASE(name) \
    case Isa::name:     \
        return runs::name();
        TARP_BUILT_ISAS(TARP_CASE)
#undef TARP_CASE
    }
    return false;
}

Isa usable_isa_named(const std::string& name, const std::string& source) {
    std::string expected;
    for (Isa isa : usable_isas()) {
        if (name == isa_name(isa)) return isa;
        expected += (expected.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::invalid_argument(source + ": got '" + name +
                                "', expected an instruction set that is built and runs on " +
                                "this processor: " + expected);
}

Isa initial_isa() {
    const char* wanted = std::getenv("TARP_CPU_ISA");
    if (wanted != nullptr && *wanted != '\0') return usable_isa_named(wanted, "environment variable TARP_CPU_ISA");
    return usable_isas().back();
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{initial_isa()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
#define TARP_CASE(name) \
    case Isa::name:     \
        return #name;
        TARP_BUILT_ISAS(TARP_CASE)
#undef TARP_CASE
    }
    return "unknown";
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> found;
#define TARP_COLLECT(name) \
    if (usable(Isa::name)) found.push_back(Isa::name);
    TARP_BUILT_ISAS(TARP_COLLECT)
#undef TARP_COLLECT
    return found;
}

Isa active_isa() {
    return active().load(std::memory_order_relaxed);
}

void set_active_isa(const std::string& name) {
    active().store(usable_isa_named(name, "set_isa"), std::memory_order_relaxed);
}

}  // namespace tarp
