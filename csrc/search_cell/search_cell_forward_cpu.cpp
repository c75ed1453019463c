// Forward: s0 and s1, then node after node, then the output: each stage passes over all tokens in tiles, and what
// passes between stages, [T, C] each, stays in cache and is what backward needs.
//
// Operations for each token: 2 · 3 d C for the projections, 2 C² for every tap and matrix that alpha selects. For the
// dominant published cell at d = 768, C = 64: 295 k and 188 k, which is the floor; all six operations take 811 k
// instead of the latter. Bytes: h is read twice and out written once, 9 KB a token in float32, 53 operations for each
// byte.
#include <omp.h>

#include "search_cell/cell.h"

namespace tarp {
namespace TARP_ISA {
namespace {

thread_local Scratch buffer;

// s0, s1 = relu(x Pᵀ + b) of a tile.
void project(const SearchCell& op, const SearchCellForward& io, const Packed& packed, const Tile& tile) {
    const int64_t W = op.inner();
    const Operand x{op.x, op.d, 1, op.bf16};
    const FloatRows left = as_floats(x, tile.token, tile.count, 0, op.d, buffer.floats(kRows * op.d), Dropout{}, op.d);
    for (int64_t column = 0; column < 2 * W; column += kColumns) {
        float* s = io.nodes + column / W * op.array() + tile.row * W + column % W;
        multiply(tile.count, op.d, left.data, left.stride, packed.in(column / kColumns), packed.in_bias() + column, 0,
                 s, W);
        for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t j = 0; j < kColumns; ++j) s[i * W + j] = s[i * W + j] > 0 ? s[i * W + j] : 0;
    }
}

// One panel of a node: Σ alpha · op(input) over its edges.
int64_t mix(const SearchCell& op, const SearchCellForward& io, const Packed& packed, const Group& group,
            const Tile& tile, int node, int64_t panel) {
    const int64_t W = op.inner(), size = tile.count * kColumns, at = tile.row * W + panel * kColumns;
    const float* alpha = op.alpha + tile.task * kEdges * kOperations;
    const Reached reached(alpha);
    float sum[kRows * kColumns] = {}, value[kRows * kColumns], gate[kRows * kColumns];
    int64_t products = 0;
    for (int edge = 0; edge < kEdges; ++edge) {
        if (kNodeOf[edge] != node) continue;
        const float* weight = alpha + edge * kOperations;
        if (weight[1] != 0 && reached.node[kInputOf[edge]]) {
            const float* input = io.nodes + kInputOf[edge] * op.array() + at;
            for (int64_t i = 0; i < tile.count; ++i)
                for (int64_t j = 0; j < kColumns; ++j) sum[i * kColumns + j] += weight[1] * input[i * W + j];
        }
        if (weight[kGlu] != 0) {
            products += affine(op, packed, io.nodes, reached, tile, edge, kGluValue, panel, value);
            products += affine(op, packed, io.nodes, reached, tile, edge, kGluGate, panel, gate);
            for (int64_t i = 0; i < size; ++i) sum[i] += weight[kGlu] * value[i] * sigmoid(gate[i]);
        }
        for (int map = 0; map < kMaps; ++map) {
            const float own = weight[kOperationOf[map]];
            if (own == 0 || kOperationOf[map] == kGlu) continue;
            products += affine(op, packed, io.nodes, reached, tile, edge, map, panel, value);
            for (int64_t i = 0; i < size; ++i) sum[i] += own * (value[i] > 0 ? value[i] : 0);
            if (io.active == nullptr) continue;
            uint8_t* active = io.active + group.slot[edge][map] * op.array() + at;
            for (int64_t i = 0; i < tile.count; ++i)
                for (int64_t j = 0; j < kColumns; ++j) active[i * W + j] = value[i * kColumns + j] > 0;
        }
    }
    float* target = io.nodes + (2 + node) * op.array() + at;
    for (int64_t i = 0; i < tile.count; ++i) memcpy(target + i * W, sum + i * kColumns, kColumns * sizeof(float));
    return products;
}

// out = h + b + mean Oᵀ of a tile, rounded once.
void output(const SearchCell& op, const SearchCellForward& io, const Packed& packed, const Tile& tile) {
    const int64_t W = op.inner();
    const Reached reached(op.alpha + tile.task * kEdges * kOperations);
    const bool any = reached.node[2] || reached.node[3] || reached.node[4];
    const Operand h{op.h, op.d, 1, op.bf16};
    float* mean = buffer.floats(kRows * (W + op.d));
    const FloatRows base = as_floats(h, tile.token, tile.count, 0, op.d, mean + kRows * W, Dropout{}, op.d);
    const float* n = io.nodes + 2 * op.array() + tile.row * W;
    if (any)
        for (int64_t i = 0; i < tile.count * W; ++i)
            mean[i] = (n[i] + n[i + op.array()] + n[i + 2 * op.array()]) * (1.0f / 3);
    float tile_sum[kRows * kColumns];
    for (int64_t column = 0; column < op.d; column += kColumns) {
        const int64_t some = smaller(kColumns, op.d - column);
        for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t j = 0; j < kColumns; ++j)
                tile_sum[i * kColumns + j] =
                    (j < some ? base.data[i * base.stride + column + j] : 0) + packed.out_bias()[column + j];
        if (any)
            multiply(tile.count, W, mean, W, packed.out(column / kColumns), tile_sum, kColumns, tile_sum, kColumns);
        for (int64_t i = 0; i < tile.count; ++i) {
            char* target = io.out + ((tile.token + i) * op.d + column) * h.element();
            if (op.bf16)
                narrow_row(tile_sum + i * kColumns, some, reinterpret_cast<uint16_t*>(target));
            else
                memcpy(target, tile_sum + i * kColumns, static_cast<size_t>(some) * sizeof(float));
        }
    }
}

void pack_weights(const SearchCell& op, const Packed& packed, const Group& group) {
    const int64_t inner = op.inner() / kColumns, outer = (op.d + kColumns - 1) / kColumns, task = group.first_task;
#pragma omp for schedule(dynamic) nowait
    for (int64_t panel = 0; panel < 2 * inner; ++panel) packed.fill_in(task, panel);
#pragma omp for schedule(dynamic) nowait
    for (int64_t panel = 0; panel < outer; ++panel) packed.fill_out(task, panel);
#pragma omp for schedule(dynamic)
    for (int i = 0; i < kEdges * kMaps; ++i)
        if (group.slot[i / kMaps][i % kMaps] >= 0) packed.fill_map(task, i / kMaps, i % kMaps, false);
}

}  // namespace

int64_t search_cell_forward(const SearchCell& op, const SearchCellForward& io) {
    Tile* tiles = reinterpret_cast<Tile*>(io.tiles);
    const int64_t count = fill_tiles(op, tiles);
    const Packed packed(op, io.packed);
    for (int array = 0; array < 2 + kNodes; ++array) clear_gaps(op, io.nodes + array * op.array());
    int64_t products = 0;
#pragma omp parallel num_threads(useful_threads(op)) reduction(+ : products)
    for (int64_t index = 0; index < groups(op); ++index) {
        const Group group(op, tiles, count, index);
        if (group.tiles.begin == group.tiles.end) continue;
        pack_weights(op, packed, group);
#pragma omp for schedule(static)
        for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i) project(op, io, packed, tiles[i]);
        for (int node = 0; node < kNodes; ++node) {
#pragma omp for schedule(static)
            for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i)
                for (int64_t panel = 0; panel * kColumns < op.inner(); ++panel)
                    products += mix(op, io, packed, group, tiles[i], node, panel);
        }
#pragma omp for schedule(static)
        for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i) output(op, io, packed, tiles[i]);
    }
    return products;
}

}  // namespace TARP_ISA
}  // namespace tarp
