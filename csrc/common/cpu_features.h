// Which instruction set the kernels use on this processor.
//
// Every kernel file is compiled once per instruction set into its own namespace (tarp::plain, tarp::avx2, ...). Its
// header declares all copies with TARP_BUILT_ISAS, and one switch over active_isa() picks:
//
//     #define TARP_DECLARE(isa) namespace isa { void kernel(const Args&); }
//     TARP_BUILT_ISAS(TARP_DECLARE)
//
// Everything that a kernel file defines belongs in its own namespace or an unnamed one, and inline functions of the
// standard library do not belong there: the linker keeps one copy of those for all instruction sets, and an AVX-512
// copy would run on a processor without it. tests/build checks the object files for that.
#pragma once

#include <string>
#include <vector>

#include "built_isas.h"

namespace tarp {

#define TARP_ENUMERATOR(isa) isa,
enum class Isa { TARP_BUILT_ISAS(TARP_ENUMERATOR) };  // in ascending order of preference
#undef TARP_ENUMERATOR

const char* isa_name(Isa isa);

// The instruction sets that are built in and that this processor and its operating system run; `plain` comes first.
std::vector<Isa> usable_isas();

// What the kernels use: the best usable one, or the one named by the environment variable TARP_CPU_ISA at first use, or
// by set_active_isa. Both throw std::invalid_argument for one that cannot run here.
Isa active_isa();
void set_active_isa(const std::string& name);

}  // namespace tarp
