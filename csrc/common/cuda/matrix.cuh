// Half-precision numbers on tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace tarp {
namespace cuda {

__device__ __forceinline__ float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float widen(__half value) {
    return __half2float(value);
}

template <class Element>
__device__ __forceinline__ Element narrow(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
    return __float2half_rn(value);
}

// Two neighbours as one word, the first in its lower half.
__device__ __forceinline__ uint32_t pair(__nv_bfloat16 first, __nv_bfloat16 second) {
    return __bfloat16_as_ushort(first) | static_cast<uint32_t>(__bfloat16_as_ushort(second)) << 16;
}
__device__ __forceinline__ uint32_t pair(__half first, __half second) {
    return __half_as_ushort(first) | static_cast<uint32_t>(__half_as_ushort(second)) << 16;
}

// D [16, 8] += A [16, 16] B [16, 8] by one warp. With g = lane / 4 and c = lane % 4 a lane holds, two neighbours a
// word:
//   A   a[0]: row g, k = 2 c, 2 c + 1;  a[1]: row g + 8, the same k;  a[2], a[3]: these rows, k = 2 c + 8, 2 c + 9
//   B   b0: k = 2 c, 2 c + 1 of column g;  b1: k = 2 c + 8, 2 c + 9
//   D   d[0], d[1]: row g, columns 2 c, 2 c + 1;  d[2], d[3]: row g + 8
template <class Element>
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                                uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices from shared memory. Lane 8 j + i gives the address of row i of matrix j, 16 bytes; with g = lane
// / 4 and c = lane % 4 a lane gets of matrix j in word j: row g, columns 2 c and 2 c + 1.
__device__ __forceinline__ void load_4_matrices(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same, transposed on the way: a lane gets of matrix j in word j: column g, rows 2 c and 2 c + 1.
__device__ __forceinline__ void load_4_matrices_transposed(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

}  // namespace cuda
}  // namespace tarp
