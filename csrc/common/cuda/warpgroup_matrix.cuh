// Products of half-precision numbers by a warpgroup, four neighbouring warps of which the first is a multiple of four,
// from tiles in shared memory. They go on while the threads do other things. sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace tarp {
namespace cuda {

// A tile whose rows are 64 elements, 128 bytes, and lie as tensor_map.cuh says, from a multiple of 1024 bytes on: in
// units of 16 bytes where it starts (bits 0-13), the distance of its groups of eight rows (32-45); pieces exchanged
// over 128 bytes (62). Bits 16-29 do not count for these.
__device__ __forceinline__ uint64_t describe_tile(const void* tile) {
    const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
    return start >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

constexpr int kStepOfTile = 16 * 2 >> 4;  // what 16 elements further in every row add to a description

// Before products whose sums, or whose tiles, the threads have written.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups are under way: the tiles of the others have been read.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Until no product is under way; the sums may be read after it, and no earlier.
template <int kSums>
__device__ __forceinline__ void wait_for_sums(float (&sum)[kSums]) {
    wait_for_products<0>();
#pragma unroll
    for (float& one : sum) asm volatile("" : "+f"(one)::"memory");
}

#define TARP_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TARP_16(i) TARP_4(i), TARP_4(i + 4), TARP_4(i + 8), TARP_4(i + 12)
#define TARP_64(i) TARP_16(i), TARP_16(i + 16), TARP_16(i + 32), TARP_16(i + 48)
#define TARP_NAMES_64                                                  \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TARP_NAMES_128                                                             \
    TARP_NAMES_64                                                                  \
    ","                                                                            \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d [64, N] += A [64, 16] B [N, 16] of the described tiles. With g = lane / 4, c = lane % 4 a lane of warp w of the
// group holds d[4 n], d[4 n + 1]: row 16 w + g, columns 8 n + 2 c, 8 n + 2 c + 1;  d[4 n + 2], d[4 n + 3]: row 16 w + g
// + 8
template <class Element, int kSums>
__device__ __forceinline__ void multiply_tiles(float (&d)[kSums], uint64_t a, uint64_t b);

#define TARP_MULTIPLY(Element, type, sums, columns, names, a_name, b_name, ...)                                      \
    template <>                                                                                                      \
    __device__ __forceinline__ void multiply_tiles<Element, sums>(float (&d)[sums], uint64_t a, uint64_t b) {        \
        asm volatile(                                                                                                \
            "{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"                                                             \
            "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " a_name ", " b_name \
            ", add, 1, 1, 0, 0; }"                                                                                   \
            : __VA_ARGS__                                                                                            \
            : "l"(a), "l"(b)                                                                                         \
            : "memory");                                                                                             \
    }
TARP_MULTIPLY(__nv_bfloat16, "bf16", 64, "128", TARP_NAMES_64, "%64", "%65", TARP_64(0))
TARP_MULTIPLY(__half, "f16", 64, "128", TARP_NAMES_64, "%64", "%65", TARP_64(0))
TARP_MULTIPLY(__nv_bfloat16, "bf16", 128, "256", TARP_NAMES_128, "%128", "%129", TARP_64(0), TARP_64(64))
TARP_MULTIPLY(__half, "f16", 128, "256", TARP_NAMES_128, "%128", "%129", TARP_64(0), TARP_64(64))
#undef TARP_MULTIPLY
#undef TARP_NAMES_128
#undef TARP_NAMES_64
#undef TARP_64
#undef TARP_16
#undef TARP_4

}  // namespace cuda
}  // namespace tarp
