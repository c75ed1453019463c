// The CUDA runtime that is built into the extension, for the host.
#pragma once

#include <utility>

namespace tarp {
namespace cuda {

// Architectures that there is machine code for, as "sm_80, sm_90a".
const char* architectures();

// Of the runtime, and the newest that the driver serves, as 1000 · major + 10 · minor; 0 without a driver.
std::pair<int, int> versions();

}  // namespace cuda
}  // namespace tarp
