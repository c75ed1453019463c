// Memory that a thread keeps between calls: packed panels and row tiles, a few hundred kilobytes.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace tarp {
namespace TARP_ISA {

// Grows and never shrinks; one per thread and slot, so that no call pays for an allocation twice.
class Scratch {
  public:
    ~Scratch() { free(memory_); }

    // At least `bytes` bytes, aligned for any vector; the content of earlier calls is lost.
    void* get(int64_t bytes) {
        if (bytes > size_) {
            free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = aligned_alloc(64, static_cast<size_t>(size_));
            if (memory_ == nullptr) abort();  // out of memory inside a parallel region: nothing can be thrown from here
        }
        return memory_;
    }
    float* floats(int64_t count) { return static_cast<float*>(get(count * 4 + 256)); }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace TARP_ISA
}  // namespace tarp
