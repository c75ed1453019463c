// Nothing where the extension is built without CUDA.
#ifdef TARP_CUDA
#    include "common/cuda/runtime.cuh"
#    include "common/cuda/runtime.h"

namespace tarp {
namespace cuda {

const char* architectures() {
    return TARP_CUDA_ARCHITECTURES;
}

std::pair<int, int> versions() {
    int runtime = 0, driver = 0;
    check(cudaRuntimeGetVersion(&runtime), "no runtime");
    check(cudaDriverGetVersion(&driver), "no driver");
    return {runtime, driver};
}

}  // namespace cuda
}  // namespace tarp
#endif
