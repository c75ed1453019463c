// The Python module tarp_kernels._C.
#include <omp.h>
#include <pybind11/pybind11.h>

#include "common/cpu_features.h"
#include "common/isa_probe.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
    py::list usable;
    for (tarp::Isa isa : tarp::usable_isas()) usable.append(tarp::isa_name(isa));
    py::dict features;
    features["usable"] = usable;
    features["active"] = tarp::isa_name(tarp::active_isa());
    features["threads"] = omp_get_max_threads();
    return features;
}

py::dict describe(const tarp::IsaProbe& probe) {
    py::dict flags;
    flags["vector_bytes"] = probe.vector_bytes;
    flags["fma"] = probe.fma;
    flags["bf16_dot"] = probe.bf16_dot;
    return flags;
}

py::dict build_info() {
    py::dict isas;
#define TARP_DESCRIBE(isa) isas[#isa] = describe(tarp::isa::compiled_with());
    TARP_BUILT_ISAS(TARP_DESCRIBE)
#undef TARP_DESCRIBE
    py::dict info;
    info["version"] = TARP_VERSION;
    info["compiler"] = __VERSION__;
    info["openmp"] = _OPENMP;
    info["sanitizers"] = TARP_SANITIZERS;
    info["cuda"] = false;  // this version has no CUDA kernels
    info["isas"] = isas;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("cpu_features", &cpu_features,
               "Instruction sets that run here, the one in use, and the number of OpenMP threads.");
    module.def("set_isa", &tarp::set_active_isa, py::arg("name"),
               "Use the kernels of one instruction set from now on.");
    module.def("build_info", &build_info, "How this extension was compiled.");
}
