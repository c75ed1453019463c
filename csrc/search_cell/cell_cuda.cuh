// What the CUDA kernels of search_cell share: a block's window of 64 rows, tiles of 64 x 64 in shared memory, products
// of them, and the weights of a cell on their way.
//
// A block makes all of a cell for its window, of which it owns the middle: the rows in front and behind are what
// convolutions of the owned ones see, and are made by the neighbours too. Rows are never multiplied with what they do
// not see: a convolution's tap reads a row of zeros in its place.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/tile.cuh"
#include "search_cell/search_cell_cuda.h"

namespace tarp {
namespace cuda {
namespace cell {

constexpr int kRows = 64, kWidth = 64;  // of a window; the widest cell
constexpr int kThreads = 256;           // 2 x 4 warps make 32 x 16 of a product each
constexpr int kTile = kRows * kWidth;   // numbers
constexpr int kMostStages = 8;  // of a pipeline
constexpr int kEdges = 9, kOperations = 6, kMaps = 5;
constexpr int kMostSteps = kEdges * 11;  // products forward with every operation alive

// A window: `first` is the token of its first row, [begin, end) are owned, all of one task.
struct Window {
    int task, first, begin, end;
};

// The affine maps of an edge: linear, the value and the gate of glu, conv3, conv5.
__device__ __forceinline__ int taps_of(int map) {
    return map < 3 ? 1 : 2 * map - 3;
}
__device__ __forceinline__ int operation_of(int map) {
    return map + (map < 2 ? 2 : 1);
}
// Nodes s0, s1, n0, n1, n2 are 0 to 4. Edges 0, 1 go to n0, 2 to 4 to n1, 5 to 8 to n2, each from its node's first
// predecessor on.
__device__ __forceinline__ int first_edge(int node) {
    return node == 2 ? 0 : node == 3 ? 2 : 5;
}
__device__ __forceinline__ int source_of(int edge) {
    return edge < 2 ? edge : edge < 5 ? edge - 2 : edge - 5;
}

// Where a number lies in a tile, in elements: rows are 128 bytes, and any eight that follow each other in different
// banks.
__device__ __forceinline__ int place(int row, int column) {
    return place_of_piece<8>(row, column / 8) + column % 8;
}

__device__ __forceinline__ int warp_row() {
    return threadIdx.x / 128 * 32;
}
__device__ __forceinline__ int warp_column() {
    return threadIdx.x / 32 % 4 * 16;
}

// This thread's part of a product: [m][n][i] is row warp_row() + 16 m + lane / 4 + 8 (i / 2), column warp_column() + 8
// n
// + 2 (lane % 4) + i % 2.
struct Sums {
    float at[2][2][4];

    __device__ __forceinline__ void fill(float value) {
        each([&](int, int, float& first, float& second) { first = second = value; });
    }

    // function(row, column, number there, its neighbour)
    template <class Function>
    __device__ __forceinline__ void each(Function function) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                    function(warp_row() + m * 16 + lane / 4 + i * 4, warp_column() + n * 8 + lane % 4 * 2, at[m][n][i],
                             at[m][n][i + 1]);
    }

    // Each number += that of its column.
    template <class OfColumn>
    __device__ __forceinline__ void add_to_columns(OfColumn of_column) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int column = warp_column() + n * 8 + threadIdx.x % 4 * 2;
            const float first = of_column(column), second = of_column(column + 1);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; i += 2) at[m][n][i] += first, at[m][n][i + 1] += second;
        }
    }

    // function(number, the other's number)
    template <class Function>
    __device__ __forceinline__ void with(const Sums& other, Function function) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) function(at[m][n][i], other.at[m][n][i]);
    }
};

// The rows of a left factor that this lane loads, one for each 16 of the warp.
template <class Element>
struct LeftRows {
    const Element* row[2];
    int exchange[2];
};

// sum += A B, or A Bᵀ where the tile holds B by columns: 64 deep.
template <class Element, bool kByColumns>
__device__ __forceinline__ void multiply(Sums& sum, const LeftRows<Element>& left, const Element* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kWidth; k += 16) {
        uint32_t right[4];  // k and k + 8 of the first eight columns, then of the second
        if (kByColumns)
            load_4_matrices(right, tile + place(warp_column() + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        else
            load_4_matrices_transposed(right, tile + place(k + lane % 16, warp_column() + lane / 16 * 8));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t rows[4];  // rows g, g + 8 of k, then of k + 8
            load_4_matrices(rows, left.row[m] + ((k / 8 + lane / 16) ^ left.exchange[m]) * 8);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply_16x8x16<Element>(sum.at[m][n], rows, right[n * 2], right[n * 2 + 1]);
        }
    }
}

// Rows [from, to) of a matrix of `columns` columns into a tile of kCount rows, zeros around them; `source` is row 0's,
// and need not be there. Rows that are multiples of 16 bytes come by copies that go on.
template <int kCount = kRows, class Element>
__device__ __forceinline__ void fetch(Element* tile, const Element* source, int64_t row_size, int from, int to,
                                      int columns, const Element* valid) {
    if (row_size % 8 == 0) {
#pragma unroll
        for (int row = threadIdx.x / 8; row < kCount; row += kThreads / 8) {
            const int column = threadIdx.x % 8 * 8;
            const bool inside = row >= from && row < to && column < columns;
            copy_16(tile + place(row, column), inside ? source + row * row_size + column : valid, inside);
        }
    } else {
        for (int i = threadIdx.x; i < kCount * kWidth; i += kThreads) {
            const int row = i / kWidth, column = i % kWidth;
            const bool inside = row >= from && row < to && column < columns;
            tile[place(row, column)] = inside ? source[row * row_size + column] : narrow<Element>(0);
        }
    }
}

// use(n, stage) for n = 0 .. steps - 1 in order, fetch(n, stage) up to stages - 1 of them before: stage = n % stages.
// What is fetched for a step is there for all threads; what follows the last step may overwrite it after a barrier.
template <class Fetch, class Use>
__device__ __forceinline__ void pipeline(int steps, int stages, Fetch fetch, Use use) {
    for (int n = 0; n < stages - 1; ++n) {
        if (n < steps) fetch(n, n);
        end_copies();
    }
    for (int n = 0, stage = 0; n < steps; ++n) {
        wait_for_copies_but(stages - 2);
        __syncthreads();  // this step's is there, and the stage of the one before is free
        const int free = stage == 0 ? stages - 1 : stage - 1;
        if (n + stages - 1 < steps) fetch(n + stages - 1, free);
        end_copies();
        use(n, stage);
        stage = stage == stages - 1 ? 0 : stage + 1;
    }
}

// A number of a bias or of LayerNorm.
template <class Element>
__device__ __forceinline__ float number(const void* tensor, int64_t index, int wide) {
    return wide ? static_cast<const float*>(tensor)[index] : widen(static_cast<const Element*>(tensor)[index]);
}

// Eight neighbours of them, the first at a multiple of eight.
template <class Element>
__device__ __forceinline__ void eight_numbers(float (&found)[8], const void* tensor, int64_t index, int wide) {
    if (wide) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + index);
        const float4 lower = from[0], upper = from[1];
        found[0] = lower.x, found[1] = lower.y, found[2] = lower.z, found[3] = lower.w;
        found[4] = upper.x, found[5] = upper.y, found[6] = upper.z, found[7] = upper.w;
    } else {
        const uint4 piece = *reinterpret_cast<const uint4*>(static_cast<const Element*>(tensor) + index);
        const Element* numbers = reinterpret_cast<const Element*>(&piece);
#pragma unroll
        for (int j = 0; j < 8; ++j) found[j] = widen(numbers[j]);
    }
}

// One product of a cell: an edge's map's tap, forward or back to the map's input.
struct Step {
    int edge, map, tap;
    bool back;

    static __device__ __forceinline__ uint16_t packed(int edge, int map, int tap, bool back) {
        return static_cast<uint16_t>(edge << 8 | back << 7 | map << 4 | tap);
    }
    static __device__ __forceinline__ Step of(uint16_t packed) {
        return {packed >> 8, packed >> 4 & 7, packed & 15, (packed & 128) != 0};
    }
    __device__ __forceinline__ int taps() const { return taps_of(map); }
    // Of the row that the tap sees.
    __device__ __forceinline__ int shift(int causal) const { return causal ? tap + 1 - taps() : tap - taps() / 2; }
};

// The products of a cell's selected operations, one edge a lane, as one list in the order of lanes. Called by one warp;
// returns their number to all lanes. each(add) calls add(map, back) for what its lane's edge needs.
template <class Each>
__device__ __forceinline__ int list_steps(uint16_t* list, int edge, Each each) {
    int own = 0;
    each([&](int map, bool) { own += taps_of(map); });
    int after = own;  // steps up to this lane's last
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffff, after, distance);
        if (static_cast<int>(threadIdx.x) % 32 >= distance) after += before;
    }
    uint16_t* next = list + after - own;
    each([&](int map, bool back) {
        for (int tap = 0; tap < taps_of(map); ++tap) *next++ = Step::packed(edge, map, tap, back);
    });
    return __shfl_sync(0xffffffff, after, 31);
}

// Forward through the edges [0, to).
__device__ __forceinline__ int list_forward(uint16_t* list, const float* alpha, int to) {
    const int edge = threadIdx.x % 32;
    return list_steps(list, edge, [&](auto add) {
        if (edge >= to) return;
        for (int map = 0; map < kMaps; ++map)
            if (alpha[edge * kOperations + operation_of(map)] != 0) add(map, false);
    });
}

// Back from the last edge to the first: the maps of each forward, every one if asked for, and the selected ones back.
__device__ __forceinline__ int list_backward(uint16_t* list, const float* alpha, bool every) {
    const int edge = kEdges - 1 - static_cast<int>(threadIdx.x) % 32;
    return list_steps(list, edge, [&](auto add) {
        if (edge < 0) return;
        for (int map = 0; map < kMaps; ++map) {
            const bool alive = alpha[edge * kOperations + operation_of(map)] != 0;
            if (alive || every) add(map, false);
            if (map == 1 || !alive) continue;  // the value of glu waits for the gate
            if (map == 2) add(1, true);
            add(map, true);
        }
    });
}

// The weights of one task's edges.
template <class Element>
struct Edges {
    const Element *linear, *glu, *conv3, *conv5;
    const void *linear_bias, *glu_bias, *conv3_bias, *conv5_bias;
    int width, wide, first;  // first: of this task's edges among those of all tasks

    __device__ __forceinline__ const Element* matrix(const Step& step) const {
        const int64_t edge = first + step.edge, size = width * width;
        if (step.map == 0) return linear + edge * size;
        if (step.map < 3) return glu + (2 * edge + step.map - 1) * size;
        return step.map == 3 ? conv3 + (3 * edge + step.tap) * size : conv5 + (5 * edge + step.tap) * size;
    }

    __device__ __forceinline__ float bias(int edge, int map, int column) const {
        if (column >= width) return 0;
        const int64_t at = first + edge;
        if (map == 0) return number<Element>(linear_bias, at * width + column, wide);
        if (map < 3) return number<Element>(glu_bias, (2 * at + map - 1) * width + column, wide);
        return number<Element>(map == 3 ? conv3_bias : conv5_bias, at * width + column, wide);
    }
};

// The two rows of a left factor that a lane loads, and which neighbours of theirs a tap may see: shifts [from, to).
struct Places {
    int from[2], to[2];

    static __device__ __forceinline__ int row(int m) { return warp_row() + m * 16 + threadIdx.x % 16; }

    // Neither beyond a token's sequence nor beyond the window.
    __device__ __forceinline__ void find(const Window& window, int tokens, const int* positions, const int* lengths) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int token = window.first + row(m);
            const bool there = token >= 0 && token < tokens;
            from[m] = there ? -min(positions[token], row(m)) : 0;
            to[m] = there ? min(lengths[token] - positions[token], kRows - row(m)) : 0;
        }
    }

    // Each row's neighbour `shift` tokens further on, zeros where it may not be seen.
    template <class Element>
    __device__ __forceinline__ LeftRows<Element> shifted(const Element* tile, int shift, const Element* zeros) const {
        LeftRows<Element> found;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int at = row(m) + shift;
            found.row[m] = shift >= from[m] && shift < to[m] ? tile + at * kWidth : zeros;
            found.exchange[m] = at & 7;
        }
        return found;
    }
};

// The rows themselves.
template <class Element>
__device__ __forceinline__ LeftRows<Element> rows_of(const Element* tile) {
    return {{tile + Places::row(0) * kWidth, tile + Places::row(1) * kWidth}, {Places::row(0) & 7, Places::row(1) & 7}};
}

// LayerNorm of the rows whose pieces a thread copies: two, 32 apart; eight threads share them.
template <class Element>
struct Norm {
    float mean[2], scale[2];

    // From h itself: a mean, then the squares about it.
    __device__ __forceinline__ void measure(const Element* h, const Window& window, const CellForm& form) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = window.first + static_cast<int>(threadIdx.x) / 8 + i * 32;
            const bool there = token >= 0 && token < form.tokens;
            const Element* row = h + static_cast<int64_t>(there ? token : 0) * form.d;
            const auto sum = [&](auto function) {
                float total = 0;
                for (int k = threadIdx.x % 8 * 8; k < form.d; k += 64) {
                    const uint4 piece = *reinterpret_cast<const uint4*>(row + k);
                    const Element* numbers = reinterpret_cast<const Element*>(&piece);
#pragma unroll
                    for (int j = 0; j < 8; ++j) total += function(widen(numbers[j]));
                }
                for (int distance = 1; distance < 8; distance *= 2)
                    total += __shfl_xor_sync(0xffffffff, total, distance);
                return total;
            };
            const float m = sum([](float v) { return v; }) / form.d;
            mean[i] = m;
            scale[i] = rsqrtf(sum([m](float v) { return (v - m) * (v - m); }) / form.d + form.eps);
        }
    }

    // Of the pieces of a tile that this thread copied, columns from `column0` on.
    __device__ __forceinline__ void apply(Element* tile, const void* norm, const void* norm_bias, int64_t task_at,
                                          int column0, const CellForm& form) const {
        const int column = threadIdx.x % 8 * 8;
        if (column0 + column >= form.d) return;
        float factor[8], shift[8];
        eight_numbers<Element>(factor, norm, task_at + column0 + column, form.wide);
        eight_numbers<Element>(shift, norm_bias, task_at + column0 + column, form.wide);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint4* at = reinterpret_cast<uint4*>(tile + place(threadIdx.x / 8 + i * 32, column));
            uint4 piece = *at;
            Element* numbers = reinterpret_cast<Element*>(&piece);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                numbers[j] = narrow<Element>((widen(numbers[j]) - mean[i]) * (scale[i] * factor[j]) + shift[j]);
            *at = piece;
        }
    }
};

// A tile of these numbers, rounded.
template <class Element>
__device__ __forceinline__ void put(Element* tile, Sums& sums) {
    sums.each([&](int row, int column, float& first, float& second) {
        *reinterpret_cast<uint32_t*>(tile + place(row, column)) =
            pair(narrow<Element>(first), narrow<Element>(second));
    });
}

// sums += a · tile: this thread's own numbers, so nobody has to wait.
template <class Element>
__device__ __forceinline__ void add(Sums& sums, float a, const Element* tile) {
    sums.each([&](int row, int column, float& first, float& second) {
        const int at = place(row, column);
        first += a * widen(tile[at]), second += a * widen(tile[at + 1]);
    });
}

// s0 and s1 before their relu, without their bias. `stages`: of three tiles each, in `memory`.
template <class Element>
__device__ __forceinline__ void project(Sums (&sums)[2], const Element* h, const void* norm, const void* norm_bias,
                                        const Element* weight, const Window& window, const CellForm& form,
                                        Element* memory, int stages) {
    Norm<Element> of_rows;
    if (norm != nullptr) of_rows.measure(h, window, form);
    const Element* from = h + static_cast<int64_t>(window.first) * form.d;
    const int64_t size = static_cast<int64_t>(form.width) * form.d;
    const int task = form.per_task ? window.task : 0;
    const Element* own = weight + task * 2 * size;
    sums[0].fill(0), sums[1].fill(0);
    pipeline((form.d + kWidth - 1) / kWidth, stages,
             [&](int n, int stage) {
                 Element* tile = memory + stage * 3 * kTile;
                 const int k = n * kWidth;
                 fetch(tile, from + k, form.d, max(0, -window.first), min(kRows, form.tokens - window.first),
                       form.d - k, h);
                 fetch(tile + kTile, own + k, form.d, 0, form.width, form.d - k, own);
                 fetch(tile + 2 * kTile, own + size + k, form.d, 0, form.width, form.d - k, own);
             },
             [&](int n, int stage) {
                 Element* tile = memory + stage * 3 * kTile;
                 if (norm != nullptr) {
                     of_rows.apply(tile, norm, norm_bias, static_cast<int64_t>(task) * form.d, n * kWidth, form);
                     __syncthreads();  // all rows are normed
                 }
                 const LeftRows<Element> rows = rows_of(tile);
                 multiply<Element, true>(sums[0], rows, tile + kTile);
                 multiply<Element, true>(sums[1], rows, tile + 2 * kTile);
             });
}

// s0 and s1 as nodes.
template <class Element>
__device__ __forceinline__ void keep_inputs(Sums (&sums)[2], const void* bias, int task, const CellForm& form,
                                            Element* nodes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = static_cast<int64_t>(2 * task + i) * form.width;
        sums[i].add_to_columns([&](int column) {
            return column < form.width ? number<Element>(bias, at + column, form.wide) : 0.0f;
        });
        sums[i].each([](int, int, float& first, float& second) {
            first = fmaxf(first, 0.0f), second = fmaxf(second, 0.0f);
        });
        put(nodes + i * kTile, sums[i]);
    }
}

// The weights of a cell on their way through `ring`, one product after the other: use(step, its tile).
template <class Element, class Use>
__device__ __forceinline__ void each_step(const uint16_t* steps, int count, const Edges<Element>& edges, Element* ring,
                                          int stages, Use use) {
    pipeline(
        count, stages,
        [&](int n, int stage) {
            const Element* matrix = edges.matrix(Step::of(steps[n]));
            fetch(ring + stage * kTile, matrix, edges.width, 0, edges.width, edges.width, matrix);
        },
        [&](int n, int stage) { use(Step::of(steps[n]), ring + stage * kTile); });
}

// sum += one tap of a map's input; after the last tap with the bias.
template <class Element>
__device__ __forceinline__ bool affine(Sums& sum, const Step& step, const Element* tile, const Element* source,
                                       const Edges<Element>& edges, const Places& places, const Element* zeros,
                                       int causal) {
    if (step.tap == 0) sum.fill(0);
    multiply<Element, true>(sum, places.shifted(source, step.shift(causal), zeros), tile);
    if (step.tap < step.taps() - 1) return false;
    sum.add_to_columns([&](int column) { return edges.bias(step.edge, step.map, column); });
    return true;
}

// The nodes from n0 to `last`, the last one left in `total`; s0 and s1 are there for the threads that made them, and the
// first product waits for those of others.
template <class Element>
__device__ __forceinline__ void make_nodes(int last, Sums& total, const uint16_t* steps, int count, const float* alpha,
                                           const Edges<Element>& edges, const Places& places, Element* nodes,
                                           Element* ring, const Element* zeros, const CellForm& form) {
    Sums product, value;
    int node = 2;
    const auto begin_node = [&]() {
        total.fill(0);
        for (int edge = first_edge(node); edge < first_edge(node) + node; ++edge) {
            const float a = alpha[edge * kOperations + 1];
            if (a != 0) add(total, a, nodes + source_of(edge) * kTile);
        }
    };
    const auto end_node = [&]() {
        put(nodes + node++ * kTile, total);
        __syncthreads();  // the node is there
    };
    begin_node();
    each_step(steps, count, edges, ring, form.stages, [&](const Step& step, const Element* tile) {
        for (; step.edge >= first_edge(node) + node; begin_node()) end_node();
        const Element* source = nodes + source_of(step.edge) * kTile;
        if (!affine(product, step, tile, source, edges, places, zeros, form.causal)) return;
        const float a = alpha[step.edge * kOperations + operation_of(step.map)];
        if (step.map == 1) {
            value = product;
        } else if (step.map == 2) {
            product.with(value, [](float& gate, float of) { gate = __fdividef(of, 1 + __expf(-gate)); });
            total.with(product, [a](float& sum, float made) { sum += a * made; });
        } else {
            total.with(product, [a](float& sum, float made) { sum += a * fmaxf(made, 0.0f); });
        }
    });
    for (; node < last; begin_node()) end_node();
}

constexpr int kOutRow = kWidth + 8;  // floats of a row on its way out: rows start eight banks apart
constexpr int kOutBytes = kRows * kOutRow * 4;

// Two pieces of eight numbers a thread, rows 32 apart, of what is added to the owned rows on their way out.
struct Pieces {
    uint4 at[2];

    template <class Element>
    __device__ __forceinline__ void load(const Element* rows, int column0, const Window& window, int d) {
        const int column = column0 + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = window.first + static_cast<int>(threadIdx.x) / 8 + i * 32;
            at[i] = make_uint4(0, 0, 0, 0);
            if (token >= window.begin && token < window.end && column < d)
                at[i] = *reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(token) * d + column);
        }
    }

    // out = these + sums + bias for 64 columns, rounded once, through `staged`. Whoever writes there next waits first.
    // bias: from number `bias_at` on, or null.
    template <class Element>
    __device__ __forceinline__ void write(Sums& sums, float* staged, const void* bias, int64_t bias_at, int wide,
                                          Element* out, int column0, const Window& window, int d) const {
        sums.each([&](int row, int column, float& first, float& second) {
            *reinterpret_cast<float2*>(staged + row * kOutRow + column) = make_float2(first, second);
        });
        __syncthreads();  // the sums are there
        const int piece = threadIdx.x % 8, column = column0 + piece * 8, turn = piece / 4;
        if (column >= d) return;
        float shift[8] = {};
        if (bias != nullptr) eight_numbers<Element>(shift, bias, bias_at + column, wide);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = threadIdx.x / 8 + i * 32, token = window.first + row;
            if (token < window.begin || token >= window.end) continue;
            const float4* from = reinterpret_cast<const float4*>(staged + row * kOutRow + piece * 8);
            float4 half[2] = {from[turn], from[1 - turn]};  // the upper four first: eight threads, 32 banks
            if (turn) {
                const float4 upper = half[0];
                half[0] = half[1], half[1] = upper;
            }
            const float* made = reinterpret_cast<const float*>(half);
            const Element* added = reinterpret_cast<const Element*>(&at[i]);
            uint4 result;
            Element* numbers = reinterpret_cast<Element*>(&result);
#pragma unroll
            for (int j = 0; j < 8; ++j) numbers[j] = narrow<Element>(widen(added[j]) + made[j] + shift[j]);
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * d + column) = result;
        }
    }
};

}  // namespace cell
}  // namespace cuda
}  // namespace tarp
