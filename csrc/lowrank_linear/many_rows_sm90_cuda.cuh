// y = x Wᵀ + b + z Uᵀ for many rows of x, as many_rows_cuda.cuh makes it, by what sm_90 alone has: a warpgroup
// multiplies tiles in shared memory, and one thread has them brought there.
//
// Operations: 2 T N (K + r), by a multiprocessor 4096 in a cycle. A step over 64 of the depth of a tile of 128 x 256 is
// 1024 cycles of them, and as many of shared memory at 128 bytes a cycle: 384 to bring 48 KB, 640 to read x once and W
// once for each of two groups of 64 rows. 85 operations a byte from the second-level cache are 48 bytes a cycle for
// each multiprocessor, of the 64 that it can take, and 11 TB/s for all of an H100's: more than that cache feeds, so it
// binds, until neighbouring blocks share what they read. Tiles of 128 x 128 would take a third more bytes of it, and
// 640 cycles of shared memory for 512 of products: they are for calls that have fewer wide tiles than the GPU has
// multiprocessors, which the bytes of W bind. Either way 192 KB of stages are under way, 3000 to 4000 cycles ahead.
//
// The first two warpgroups multiply 64 rows each. Of the third one thread asks for the tiles of x and W, in boxes; then
// all of it writes z and U, whose rows need not start where boxes can, in place of the last tiles while those before
// them are multiplied. A box goes on into the rows of the next task, which nobody writes.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/mbarrier.cuh"
#include "common/cuda/tensor_map.cuh"
#include "common/cuda/warpgroup_matrix.cuh"
#include "lowrank_linear/many_rows_tiles_cuda.cuh"

namespace tarp {
namespace cuda {

namespace many_sm90 {

constexpr int kDepth = kBoxDepth, kPieces = kDepth / 8;  // of 16 bytes, in a row
constexpr int kMultipliers = 256, kBringers = 128, kBlockThreads = kMultipliers + kBringers;
constexpr int kMapThreads = 64;
constexpr int kRingBytes = 192 * 1024;         // y takes less
constexpr int kSharedBytes = kRingBytes + 96;  // and two barriers for each of at most 6 stages
static_assert(kSharedBytes <= 227 * 1024, "more than a block can have");
enum Barriers { kOfBringers = 1, kOfMultipliers };

template <int kColumns>
struct Stage {
    static constexpr int kSize = (kRowTile + kColumns) * kDepth;  // elements: a tile of x, then one of W
    static constexpr int kBytes = 2 * kSize, kCount = kRingBytes / kBytes;
};

// Elements [from, from + 8) of a row that has `rank`, then zeros.
template <class Element>
__device__ __forceinline__ uint4 piece_of(const Element* row, int from, int rank) {
    if (rank % 8 == 0) return from < rank ? *reinterpret_cast<const uint4*>(row + from) : make_uint4(0, 0, 0, 0);
    const auto two = [&](int k) {
        const Element zero = narrow<Element>(0);
        return pair(k < rank ? row[k] : zero, k + 1 < rank ? row[k + 1] : zero);
    };
    return make_uint4(two(from), two(from + 2), two(from + 4), two(from + 6));
}

}  // namespace many_sm90

// Two warps describe x and W for the kernel below. A launch of its own: a description goes to global memory before the
// copy engine may read it, and blocks that made their own would all begin with that wait.
__global__ void __launch_bounds__(many_sm90::kMapThreads)
    tile_maps_kernel(const void* x, const void* weight, unsigned char* maps, int columns, const ManyRowsForm form) {
    __shared__ __align__(kMapBytes) uint32_t made[2][kMapBytes / 4];
    if (threadIdx.x < 32)
        describe_matrix(made[0], maps, x, form.x_rows, form.in, form.x_row, kRowTile);
    else
        describe_matrix(made[1], maps + kMapBytes, weight, form.out, form.in, form.weight_row, columns);
}

template <class Element, int kColumns>
__global__ void __launch_bounds__(many_sm90::kBlockThreads, 1)
    many_rows_sm90_kernel(const unsigned char* maps, const Element* bias, const Element* z, const Element* U,
                          const int64_t* segments, const int64_t* write, Element* y, const ManyRowsForm form) {
    using namespace many_sm90;
    constexpr int kStages = Stage<kColumns>::kCount;
    extern __shared__ __align__(1024) unsigned char memory[];
    Element* stages = reinterpret_cast<Element*>(memory);
    uint64_t* full = reinterpret_cast<uint64_t*>(memory + kRingBytes);  // a stage is there
    uint64_t* read = full + kStages;                                    // by all warps that multiply
    const int thread = threadIdx.x, lane = thread % 32;
    const TaskRows rows = rows_of_tile(blockIdx.y, kRowTile, segments, form.tasks, form.rows);
    const int column0 = blockIdx.x * kColumns, columns = min(kColumns, form.out - column0);
    const int count = rows.end - rows.begin;
    if (count <= 0) return;

    if (thread == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(full + i, 1);
            init_barrier(read + i, kMultipliers / 32);
        }
        show_to_copies();
    }
    __syncthreads();  // the barriers are there

    const int steps = (form.in + kDepth - 1) / kDepth, all_steps = steps + (form.rank + kDepth - 1) / kDepth;
    const auto stage_of = [&](int number) { return stages + number % kStages * Stage<kColumns>::kSize; };
    const auto wait_until_read = [&](int number) {  // what lay where stage `number` will
        if (number >= kStages) wait_for_phase(read + number % kStages, (number / kStages - 1) % 2);
    };
    if (thread >= kMultipliers) {
        const int own = thread - kMultipliers;
        if (own == 0) {
            const unsigned char *map_of_x = maps, *map_of_W = maps + kMapBytes;
            acquire_map(map_of_x);
            acquire_map(map_of_W);
            for (int number = 0; number < steps; ++number) {
                uint64_t* barrier = full + number % kStages;
                wait_until_read(number);
                arrive_expecting(barrier, Stage<kColumns>::kBytes);
                copy_box(stage_of(number), map_of_x, rows.begin, number * kDepth, barrier);
                copy_box(stage_of(number) + kRowTile * kDepth, map_of_W, column0, number * kDepth, barrier);
            }
        }
        sync_warps<kOfBringers, kBringers>();  // all tiles of x and W are asked for: phases are those of z and U
        const Element* own_U = U + static_cast<int64_t>(rows.task) * form.out * form.rank;
        for (int number = steps; number < all_steps; ++number) {
            wait_until_read(number);
            for (int i = own; i < (kRowTile + kColumns) * kPieces; i += kBringers) {
                const int line = i / kPieces, piece = i % kPieces, row = line < kRowTile ? line : line - kRowTile;
                const bool of_z = line < kRowTile, wanted = row < (of_z ? count : columns);
                const Element* source =
                    (of_z ? z : own_U) + static_cast<int64_t>(of_z ? rows.begin + row : column0 + row) * form.rank;
                const uint4 value = wanted ? piece_of(source, (number - steps) * kDepth + piece * 8, form.rank)
                                           : make_uint4(0, 0, 0, 0);
                *reinterpret_cast<uint4*>(stage_of(number) + line * kDepth + (piece ^ row % 8) * 8) = value;
            }
            show_to_copies();
            sync_warps<kOfBringers, kBringers>();  // z and U are there
            if (own == 0) arrive(full + number % kStages);
        }
        return;
    }

    const int group_row = thread / 128 * 64;
    float sum[kColumns / 2] = {};
    for (int number = 0; number < all_steps; ++number) {
        wait_for_phase(full + number % kStages, number / kStages % 2);
        const uint64_t a = describe_tile(stage_of(number) + group_row * kDepth);
        const uint64_t b = describe_tile(stage_of(number) + kRowTile * kDepth);
        begin_products();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) multiply_tiles<Element>(sum, a + k * kStepOfTile, b + k * kStepOfTile);
        end_products();
        wait_for_products<1>();
        if (number > 0 && lane == 0) arrive(read + (number - 1) % kStages);  // the step before this one is done
    }
    wait_for_sums(sum);

    // y goes out by rows, through shared memory.
    sync_warps<kOfMultipliers, kMultipliers>();  // both groups have read the last stages
    constexpr int kOutRow = kColumns + kOutPad;
    const int row = group_row + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        float shift[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            shift[i] = bias == nullptr || column + i >= columns ? 0 : widen(bias[column0 + column + i]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(stages + (row + half * 8) * kOutRow + column) =
                pair(narrow<Element>(sum[n * 4 + half * 2] + shift[0]),
                     narrow<Element>(sum[n * 4 + half * 2 + 1] + shift[1]));
    }
    sync_warps<kOfMultipliers, kMultipliers>();  // y is there
    write_rows<kColumns, kMultipliers>(stages, y, rows, column0, write, form, thread);
}

}  // namespace cuda
}  // namespace tarp
