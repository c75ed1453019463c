// Memory that a thread keeps between calls: packed panels, row tiles, what passes between the stages of a call.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "common/large_pages.h"

namespace tarp {
namespace TARP_ISA {

// Grows and stays, one per thread and slot, so that no call pays for an allocation twice: the system's fresh pages cost
// a third of a backward pass of a search cell.
class Scratch {
  public:
    ~Scratch() { free(memory_); }

    // At least `bytes` bytes, aligned for any vector; the content of earlier calls is lost.
    void* get(int64_t bytes) {
        if (bytes > size_) {
            free(memory_);
            const int64_t page = bytes < kLargePage ? 4096 : kLargePage;
            size_ = (bytes + page - 1) / page * page;
            memory_ = aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size_));
            if (memory_ == nullptr) abort();  // out of memory inside a parallel region: nothing can be thrown from here
            prefer_large_pages(memory_, size_);
        }
        return memory_;
    }
    float* floats(int64_t count) { return static_cast<float*>(get(count * 4 + 256)); }

    // What is larger than that, goes back after the call that needed it.
    void keep_at_most(int64_t bytes) {
        if (size_ <= bytes) return;
        free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace TARP_ISA
}  // namespace tarp
