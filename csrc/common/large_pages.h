// Memory in large pages, where the system has them to give.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#    include <sys/mman.h>
#endif

namespace tarp {

constexpr int64_t kLargePage = 2 << 20;

// For results that a kernel is about to write for the first time. The system hands out fresh memory page by page, and
// 6 MB of small pages cost as much as 500 million multiplications on one core; large ones a tenth of that. Asking is a
// hint: where it is refused, or the memory is there already, nothing changes.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t mask = kLargePage - 1, begin = (reinterpret_cast<uintptr_t>(memory) + mask) & ~mask;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~mask;
    if (memory != nullptr && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace tarp
