// What the host hands to the CUDA kernels of search_cell. Symbols as in search_cell.h.
#pragma once

#include <array>
#include <cstdint>

namespace tarp {
namespace cuda {

// Everything about a call that is not a tensor; tests write these numbers byte by byte.
struct CellForm {
    int tokens, d, width;      // T, d, C
    int causal;                // 1: a tap sees the token and those before it; 0: both sides
    int per_task, alpha_task;  // 1: one cell for each task; numbers between the alphas of two tasks, 0: one for all
    int wide;                  // 1: biases and LayerNorm are float32, 0: they have h's type
    int stages;                // 8 KB tiles of weights on the way, 2 to 8
    float eps;                 // of LayerNorm
};

struct CellLaunch {
    int device;
    void* stream;
    bool bf16;  // h's type, otherwise float16
    int blocks, shared_bytes;
};

// Addresses of a kernel's tensors in its order, 0 for null.
template <int kCount>
using CellPointers = std::array<uintptr_t, kCount>;

// Each starts the kernel of its name on the stream, and throws std::runtime_error where CUDA refuses.
void search_cell_forward(const CellLaunch& launch, const CellPointers<20>& tensors, const CellForm& form);
void search_cell_backward(const CellLaunch& launch, const CellPointers<26>& tensors, const CellForm& form);
// A block for each chunk (`blocks`) and slot.
void search_cell_gradients(const CellLaunch& launch, const CellPointers<7>& tensors, int slots, int size,
                           const CellForm& form);
// `wide`: gradients are float32, otherwise of h's type.
void search_cell_add(const CellLaunch& launch, const CellPointers<11>& tensors, int slots, int tasks, int width,
                     int size, bool wide);

}  // namespace cuda
}  // namespace tarp
