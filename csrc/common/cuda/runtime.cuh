// What every launch on the host needs.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace tarp {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("backend='cuda': ") + what + ": " + cudaGetErrorString(error) +
                             "; backend='triton' needs none of this");
}

// The device of a call is current until the end of the block.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) : device_(device) {
        check(cudaGetDevice(&before_), "no current device");
        if (before_ != device_) check(cudaSetDevice(device_), "the device of x cannot be used");
    }
    ~CurrentDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int device_, before_ = 0;
};

// A kernel's shared memory beyond what needs no asking, of which its own variables may have some.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
    constexpr int kWithoutAsking = 40 * 1024;
    if (bytes > kWithoutAsking)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "not enough shared memory");
}

}  // namespace cuda
}  // namespace tarp
