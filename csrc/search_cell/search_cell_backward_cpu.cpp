// Backward: the gradient of the mean, then from n2 back to s0 and s1. At each node dn spreads to the affine maps of its
// edges, as gradients before the activation; at each input these are gathered through the turned matrices. Then the
// gradients of the weights, each a tall-skinny sum over the tokens in their order, whatever the number of threads.
//
// Operations: twice those of forward. Operations that alpha did not select run only for dalpha, and nothing is kept.
#include <omp.h>

#include "search_cell/cell.h"

namespace tarp {
namespace TARP_ISA {
namespace {

thread_local Scratch buffer, tall_buffer;

struct Workspace {
    float* dn;      // [3, rows, W]: ∂L/∂n0, n1, n2
    float* spread;  // [slots, rows, W]: gradients of the affine maps
    float* mean;    // [T, W]
    float* ds;      // [T, 2 W]: before the relu of s0 and s1
    float* dalpha;  // [tiles, 54]
    float* dout;    // [C, d]: the gradient of the output matrix, transposed

    Workspace(const SearchCell& op, float* memory) {
        dn = memory;
        spread = dn + kNodes * op.array();
        mean = spread + op.slots() * op.array();
        ds = mean + op.tokens * op.inner();
        dalpha = ds + op.tokens * 2 * op.inner();
        dout = dalpha + op.tiles() * kEdges * kOperations;
    }
};

class Backward {
  public:
    Backward(const SearchCell& op, const SearchCellBackward& io, const Packed& packed, const Workspace& work,
             const Group& group)
        : op_(op), io_(io), packed_(packed), work_(work), group_(group), W_(op.inner()) {}

    // ∂L/∂mean of a tile goes to every node; the mean is kept for the output's gradient.
    void start(const Tile& tile) const {
        const Operand dout{io_.dout, op_.d, 1, op_.bf16};
        const FloatRows left =
            as_floats(dout, tile.token, tile.count, 0, op_.d, buffer.floats(kRows * op_.d), Dropout{}, op_.d);
        const float zero[kColumns] = {};
        float sum[kRows * kColumns];
        for (int64_t column = 0; column < W_; column += kColumns) {
            multiply(tile.count, op_.d, left.data, left.stride, packed_.out_turned(column / kColumns), zero, 0, sum,
                     kColumns);
            for (int64_t i = 0; i < tile.count; ++i)
                for (int64_t j = 0; j < kColumns; ++j)
                    for (int node = 0; node < kNodes; ++node)
                        dn(node)[(tile.row + i) * W_ + column + j] = sum[i * kColumns + j] * (1.0f / 3);
        }
        const float* n = io_.nodes + 2 * op_.array() + tile.row * W_;
        float* mean = work_.mean + tile.token * W_;
        for (int64_t i = 0; i < tile.count * W_; ++i)
            mean[i] = (n[i] + n[i + op_.array()] + n[i + 2 * op_.array()]) * (1.0f / 3);
    }

    // What the edges that read an input (s0, s1, n0, n1) add to its gradient: rows of a panel, on top of `sum`.
    int64_t gather(const Tile& tile, int input, int64_t panel, float* sum) const {
        const float* alpha = op_.alpha + tile.task * kEdges * kOperations;
        int64_t products = 0;
        for (int edge = 0; edge < kEdges; ++edge) {
            if (kInputOf[edge] != input) continue;
            const float identity = alpha[edge * kOperations + 1];
            const float* from = dn(kNodeOf[edge]) + tile.row * W_ + panel * kColumns;
            if (identity != 0)
                for (int64_t i = 0; i < tile.count; ++i)
                    for (int64_t j = 0; j < kColumns; ++j) sum[i * kColumns + j] += identity * from[i * W_ + j];
            for (int map = 0; map < kMaps; ++map) {
                if (alpha[edge * kOperations + kOperationOf[map]] == 0) continue;
                const int64_t row = tile.row - first_tap(op_, map) - (kTaps[map] - 1);
                multiply(tile.count, kTaps[map] * W_, spread(edge, map) + row * W_, W_,
                         packed_.map(edge, map, panel, true), sum, kColumns, sum, kColumns);
                if (panel == 0) products += tile.count * kTaps[map];
            }
        }
        return products;
    }

    // Gradients of the affine maps of a node's edges, and of alpha, from ∂L/∂node of a tile.
    int64_t spread_node(const Tile& tile, int64_t index, int node, int64_t panel) const {
        const float* alpha = op_.alpha + tile.task * kEdges * kOperations;
        const Reached reached(alpha);
        const int64_t at = tile.row * W_ + panel * kColumns, size = tile.count * kColumns;
        float value[kRows * kColumns], gate[kRows * kColumns];
        int64_t products = 0;
        for (int edge = 0; edge < kEdges; ++edge) {
            if (kNodeOf[edge] != node) continue;
            const float* own = alpha + edge * kOperations;
            for (int map = 0; map < kMaps; ++map) {
                const float weight = own[kOperationOf[map]];
                if (group_.slot[edge][map] < 0 || kOperationOf[map] == kGlu) continue;
                const uint8_t* active = io_.active + group_.slot[edge][map] * op_.array() + at;
                const float* from = dn(node) + at;
                float* target = spread(edge, map) + at;
                for (int64_t i = 0; i < tile.count; ++i)
                    for (int64_t j = 0; j < kColumns; ++j)
                        target[i * W_ + j] = weight != 0 && active[i * W_ + j] ? weight * from[i * W_ + j] : 0;
            }
            if (group_.slot[edge][kGluValue] >= 0 || io_.dalpha != nullptr) {
                products += affine(op_, packed_, io_.nodes, reached, tile, edge, kGluValue, panel, value);
                products += affine(op_, packed_, io_.nodes, reached, tile, edge, kGluGate, panel, gate);
                for (int64_t i = 0; i < size; ++i) gate[i] = sigmoid(gate[i]);
            }
            if (group_.slot[edge][kGluValue] >= 0) {
                float *dvalue = spread(edge, kGluValue) + at, *dgate = spread(edge, kGluGate) + at;
                for (int64_t i = 0; i < tile.count; ++i)
                    for (int64_t j = 0; j < kColumns; ++j) {
                        const float g = gate[i * kColumns + j], d = own[kGlu] * dn(node)[at + i * W_ + j];
                        dvalue[i * W_ + j] = d * g;
                        dgate[i * W_ + j] = d * value[i * kColumns + j] * g * (1 - g);
                    }
            }
            if (io_.dalpha == nullptr) continue;
            float* dalpha = work_.dalpha + index * kEdges * kOperations + edge * kOperations;
            if (panel == 0)
                for (int m = 0; m < kOperations; ++m) dalpha[m] = 0;
            for (int64_t i = 0; i < size; ++i) value[i] *= gate[i];
            dalpha[kGlu] += inner_product(tile, node, panel, value, kColumns);
            dalpha[1] += inner_product(tile, node, panel, io_.nodes + kInputOf[edge] * op_.array() + at, W_);
            for (int map = 0; map < kMaps; ++map) {
                if (kOperationOf[map] == kGlu) continue;
                products += affine(op_, packed_, io_.nodes, reached, tile, edge, map, panel, value);
                for (int64_t i = 0; i < size; ++i) value[i] = value[i] > 0 ? value[i] : 0;
                dalpha[kOperationOf[map]] += inner_product(tile, node, panel, value, kColumns);
            }
        }
        return products;
    }

    // ∂L/∂node of a tile complete, then spread.
    int64_t node(const Tile& tile, int64_t index, int node) const {
        const Reached reached(op_.alpha + tile.task * kEdges * kOperations);
        const bool matters = io_.dalpha != nullptr || reached.node[2 + node];
        int64_t products = 0;
        float sum[kRows * kColumns];
        for (int64_t panel = 0; panel * kColumns < W_; ++panel) {
            if (matters && node < 2) {  // n2 is nobody's input
                float* own = dn(node) + tile.row * W_ + panel * kColumns;
                copy(own, W_, sum, kColumns, tile.count);
                products += gather(tile, node + 2, panel, sum);
                copy(sum, kColumns, own, W_, tile.count);
            }
            products += spread_node(tile, index, node, panel);
        }
        return products;
    }

    // ds of a tile, and dx = ds P (+ dout).
    int64_t finish(const Tile& tile) const {
        int64_t products = 0;
        float sum[kRows * kColumns];
        float* ds = work_.ds + tile.token * 2 * W_;
        for (int input = 0; input < 2; ++input)
            for (int64_t panel = 0; panel * kColumns < W_; ++panel) {
                memset(sum, 0, sizeof sum);
                products += gather(tile, input, panel, sum);
                const float* s = io_.nodes + input * op_.array() + tile.row * W_ + panel * kColumns;
                float* target = ds + input * W_ + panel * kColumns;
                for (int64_t i = 0; i < tile.count; ++i)
                    for (int64_t j = 0; j < kColumns; ++j)
                        target[i * 2 * W_ + j] = s[i * W_ + j] > 0 ? sum[i * kColumns + j] : 0;
            }
        if (io_.dx == nullptr) return products;
        const Operand dout{io_.dout, op_.d, 1, op_.bf16};
        const FloatRows base =
            as_floats(dout, tile.token, tile.count, 0, op_.d, buffer.floats(kRows * op_.d), Dropout{}, op_.d);
        for (int64_t column = 0; column < op_.d; column += kColumns) {
            const int64_t some = smaller(kColumns, op_.d - column);
            for (int64_t i = 0; i < tile.count; ++i)
                for (int64_t j = 0; j < kColumns; ++j)
                    sum[i * kColumns + j] = io_.residual && j < some ? base.data[i * base.stride + column + j] : 0;
            multiply(tile.count, 2 * W_, ds, 2 * W_, packed_.in_turned(column / kColumns), sum, kColumns, sum,
                     kColumns);
            for (int64_t i = 0; i < tile.count; ++i) {
                char* target = io_.dx + ((tile.token + i) * op_.d + column) * dout.element();
                if (op_.bf16)
                    narrow_row(sum + i * kColumns, some, reinterpret_cast<uint16_t*>(target));
                else
                    memcpy(target, sum + i * kColumns, static_cast<size_t>(some) * sizeof(float));
            }
        }
        return products;
    }

    // Columns `columns` of the gradient of one tap of a map, and of its bias.
    void map_gradient(int edge, int map, int tap, Range columns) const {
        const int64_t C = op_.width, rows = group_.rows.end - group_.rows.begin;
        float* matrix = matrices(io_.gradients, op_, group_.first_task, edge, map);
        float* sums = bias(io_.gradients, op_, group_.first_task, edge, map);
        const float* d = spread(edge, map) + group_.rows.begin * W_;
        const Operand input{reinterpret_cast<const char*>(io_.nodes + kInputOf[edge] * op_.array()), W_, 1, false};
        if (wanted(io_.gradients, map, false) && input_reached(edge))
            tall(input, group_.rows.begin + first_tap(op_, map) + tap, rows, columns, d, C, W_, matrix + tap * C * C, C,
                 Dropout{}, C, tall_buffer);
        if (tap == 0 && wanted(io_.gradients, map, true)) sum_rows(d, W_, rows, columns, sums);
    }
    // Columns of d of the gradient of a projection.
    void project_gradient(int which, Range columns) const {
        const int64_t C = op_.width, T = group_.tokens.end - group_.tokens.begin;
        const int64_t task = op_.per_task ? group_.first_task : 0;
        const float* ds = work_.ds + group_.tokens.begin * 2 * W_ + which * W_;
        if (io_.gradients.project != nullptr)
            tall({op_.x, op_.d, 1, op_.bf16}, group_.tokens.begin, T, columns, ds, C, 2 * W_,
                 io_.gradients.project + (task * 2 + which) * C * op_.d, op_.d, Dropout{}, op_.d, tall_buffer);
        if (columns.begin == 0 && io_.gradients.project_bias != nullptr)
            sum_rows(ds, 2 * W_, T, {0, C}, io_.gradients.project_bias + (task * 2 + which) * C);
    }
    // Columns of d of the gradient of the output.
    void output_gradient(Range columns) const {
        const int64_t C = op_.width, T = group_.tokens.end - group_.tokens.begin;
        const int64_t task = op_.per_task ? group_.first_task : 0;
        const Operand dout{io_.dout, op_.d, 1, op_.bf16};
        if (io_.gradients.output != nullptr) {
            tall(dout, group_.tokens.begin, T, columns, work_.mean + group_.tokens.begin * W_, C, W_, work_.dout, op_.d,
                 Dropout{}, op_.d, tall_buffer);
            float* target = io_.gradients.output + task * op_.d * C;
            for (int64_t n = columns.begin; n < columns.end; ++n)
                for (int64_t c = 0; c < C; ++c) target[n * C + c] = work_.dout[c * op_.d + n];
        }
        if (io_.gradients.output_bias == nullptr) return;
        float* sums = io_.gradients.output_bias + task * op_.d;
        for (int64_t n = columns.begin; n < columns.end; ++n) sums[n] = 0;
        for (int64_t t = group_.tokens.begin; t < group_.tokens.end; ++t)
            for (int64_t n = columns.begin; n < columns.end; ++n) sums[n] += dout.value(t, n);
    }

    float* dn(int node) const { return work_.dn + node * op_.array(); }
    float* spread(int edge, int map) const { return work_.spread + group_.slot[edge][map] * op_.array(); }

  private:
    bool input_reached(int edge) const {
        bool some = false;
        for (int64_t task = group_.first_task; task < group_.last_task; ++task)
            some = some || Reached(op_.alpha + task * kEdges * kOperations).node[kInputOf[edge]];
        return some;
    }
    static bool wanted(const CellGradientPointers& g, int map, bool of_bias) {
        const float* pointers[kMaps][2] = {{g.linear, g.linear_bias},
                                           {g.glu, g.glu_bias},
                                           {g.glu, g.glu_bias},
                                           {g.conv3, g.conv3_bias},
                                           {g.conv5, g.conv5_bias}};
        return pointers[map][of_bias] != nullptr;
    }
    static void copy(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i) memcpy(to + i * to_row, from + i * from_row, kColumns * sizeof(float));
    }
    static void sum_rows(const float* a, int64_t a_row, int64_t rows, Range columns, float* sums) {
        for (int64_t j = columns.begin; j < columns.end; ++j) sums[j] = 0;
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t j = columns.begin; j < columns.end; ++j) sums[j] += a[t * a_row + j];
    }
    float inner_product(const Tile& tile, int node, int64_t panel, const float* value, int64_t row) const {
        const float* d = dn(node) + tile.row * W_ + panel * kColumns;
        float sums[kColumns] = {}, sum = 0;
        for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t j = 0; j < kColumns; ++j) sums[j] += d[i * W_ + j] * value[i * row + j];
        for (int64_t j = 0; j < kColumns; ++j) sum += sums[j];
        return sum;
    }

    const SearchCell& op_;
    const SearchCellBackward& io_;
    const Packed& packed_;
    const Workspace& work_;
    const Group& group_;
    int64_t W_;
};

// glu runs again in backward, every operation where alpha asks for its gradient.
void pack_weights(const SearchCell& op, const Packed& packed, const Group& group, bool every) {
    const int64_t inner = op.inner() / kColumns, outer = (op.d + kColumns - 1) / kColumns, task = group.first_task;
#pragma omp for schedule(dynamic) nowait
    for (int64_t panel = 0; panel < inner; ++panel) packed.fill_out_turned(task, panel);
#pragma omp for schedule(dynamic) nowait
    for (int64_t panel = 0; panel < outer; ++panel) packed.fill_in_turned(task, panel);
#pragma omp for schedule(dynamic)
    for (int i = 0; i < kEdges * kMaps; ++i) {
        const int edge = i / kMaps, map = i % kMaps;
        const bool own = group.slot[edge][map] >= 0;
        if (own) packed.fill_map(task, edge, map, true);
        if (every || (own && kOperationOf[map] == kGlu)) packed.fill_map(task, edge, map, false);
    }
}

void weight_gradients(const SearchCell& op, const Group& group, const Backward& backward) {
    const int64_t inner = (op.width + kColumns - 1) / kColumns, outer = (op.d + kColumns - 1) / kColumns;
    const auto columns = [](int64_t panel, int64_t width) {
        return Range{panel * kColumns, smaller((panel + 1) * kColumns, width)};
    };
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < outer; ++i) {
        backward.project_gradient(0, columns(i, op.d));
        backward.project_gradient(1, columns(i, op.d));
        backward.output_gradient(columns(i, op.d));
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < kEdges * kMaps * 5 * inner; ++i) {
        const int64_t panel = i % inner, tap = i / inner % 5, map = i / inner / 5 % kMaps, edge = i / inner / 5 / kMaps;
        if (group.slot[edge][map] < 0 || tap >= kTaps[map]) continue;
        backward.map_gradient(static_cast<int>(edge), static_cast<int>(map), static_cast<int>(tap),
                              columns(panel, op.width));
    }
}

// The sums over each task's tiles in their order.
void sum_dalpha(const SearchCell& op, const SearchCellBackward& io, const Workspace& work, const Tile* tiles,
                int64_t count) {
    constexpr int kAll = kEdges * kOperations;
    for (int i = 0; i < kAll; ++i) {
        for (int64_t task = 0; task < op.tasks; ++task) io.dalpha[task * kAll + i] = 0;
        double sum = 0;
        for (int64_t t = 0; t < count; ++t) {
            sum += static_cast<double>(work.dalpha[t * kAll + i]);
            if (t + 1 < count && tiles[t + 1].task == tiles[t].task) continue;
            io.dalpha[tiles[t].task * kAll + i] = static_cast<float>(sum);
            sum = 0;
        }
    }
}

}  // namespace

int64_t search_cell_backward(const SearchCell& op, const SearchCellBackward& io) {
    Tile* tiles = reinterpret_cast<Tile*>(io.tiles);
    const int64_t count = fill_tiles(op, tiles);
    const Packed packed(op, io.packed);
    const Workspace work(op, io.workspace);
    int64_t products = 0;
#pragma omp parallel num_threads(useful_threads(op)) reduction(+ : products)
    {
#pragma omp for schedule(static)
        for (int64_t slot = 0; slot < op.slots(); ++slot) clear_gaps(op, work.spread + slot * op.array());
        for (int64_t index = 0; index < groups(op); ++index) {
            const Group group(op, tiles, count, index);
            if (group.tiles.begin == group.tiles.end) continue;
            const Backward backward(op, io, packed, work, group);
            pack_weights(op, packed, group, io.dalpha != nullptr);
#pragma omp for schedule(static)
            for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i) {
                backward.start(tiles[i]);
                products += backward.node(tiles[i], i, 2);
            }
            for (int node = 1; node >= 0; --node) {
#pragma omp for schedule(static)
                for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i)
                    products += backward.node(tiles[i], i, node);
            }
#pragma omp for schedule(static)
            for (int64_t i = group.tiles.begin; i < group.tiles.end; ++i) products += backward.finish(tiles[i]);
            weight_gradients(op, group, backward);
        }
    }
    if (io.dalpha != nullptr) sum_dalpha(op, io, work, tiles, count);
    return products;
}

}  // namespace TARP_ISA
}  // namespace tarp
