// What forward and backward share: the tokens of a call in tiles, the cells whose weights are packed, one affine map.
#pragma once

#include <math.h>

#include "common/products.h"
#include "search_cell/search_cell.h"

namespace tarp {
namespace TARP_ISA {

// Up to kRows tokens of one sequence.
struct Tile {
    int64_t token, row, count, task;  // row: of the first token in an inner array
};

inline int64_t fill_tiles(const SearchCell& op, Tile* tiles) {
    int64_t count = 0;
    for (int64_t task = 0; task < op.tasks; ++task)
        for (int64_t s = op.task_sequences[task]; s < op.task_sequences[task + 1]; ++s)
            for (int64_t t = op.offsets[s]; t < op.offsets[s + 1]; t += kRows)
                tiles[count++] = {t, t + kGap * (s + 1), smaller(kRows, op.offsets[s + 1] - t), task};
    return count;
}

// The tasks that share one cell's weights: all of them, or one.
struct Group {
    int64_t first_task, last_task;
    Range tiles, tokens, rows;
    bool selected[kEdges][kOperations];  // by some task
    int slot[kEdges][kMaps];             // of the maps that are selected; others -1

    Group(const SearchCell& op, const Tile* all, int64_t count, int64_t index)
        : first_task(op.per_task ? index : 0), last_task(op.per_task ? index + 1 : op.tasks) {
        const int64_t first = op.task_sequences[first_task], last = op.task_sequences[last_task];
        tokens = {op.offsets[first], op.offsets[last]};
        rows = {tokens.begin + kGap * (first + 1), tokens.end + kGap * (last < first + 1 ? first + 1 : last)};
        tiles = {0, 0};
        while (tiles.begin < count && all[tiles.begin].task < first_task) ++tiles.begin;
        tiles.end = tiles.begin;
        while (tiles.end < count && all[tiles.end].task < last_task) ++tiles.end;
        int next = 0;
        for (int edge = 0; edge < kEdges; ++edge) {
            bool somewhere[kOperations];  // in any group: slots are numbered over all of them
            for (int m = 0; m < kOperations; ++m) {
                selected[edge][m] = somewhere[m] = false;
                for (int64_t task = 0; task < op.tasks; ++task)
                    if (op.alpha[(task * kEdges + edge) * kOperations + m] != 0) {
                        somewhere[m] = true;
                        if (task >= first_task && task < last_task) selected[edge][m] = true;
                    }
            }
            for (int map = 0; map < kMaps; ++map) {
                const int own = somewhere[kOperationOf[map]] ? next++ : -1;
                slot[edge][map] = selected[edge][kOperationOf[map]] ? own : -1;
            }
        }
    }
};

inline int64_t groups(const SearchCell& op) {
    return op.per_task ? op.tasks : 1;
}

// Whether anything reaches s0, s1, n0, n1, n2 of a task; a node that nothing reaches is zero.
struct Reached {
    bool node[2 + kNodes] = {true, true, false, false, false};

    explicit Reached(const float* alpha) {
        for (int edge = 0; edge < kEdges; ++edge)
            for (int m = 1; m < kOperations; ++m)
                if (alpha[edge * kOperations + m] != 0 && (m > 1 || node[kInputOf[edge]]))
                    node[2 + kNodeOf[edge]] = true;
    }
};

// The pointers to an affine map's matrices [taps, C, C] and its bias [C] in a stack over edges (and tasks).
template <class Pointers>
inline auto matrices(const Pointers& w, const SearchCell& op, int64_t task, int edge, int map) -> decltype(w.linear) {
    const int64_t C2 = op.width * op.width, at = (op.per_task ? task : 0) * kEdges + edge;
    switch (map) {
        case 0:
            return w.linear + at * C2;
        case 3:
            return w.conv3 + at * 3 * C2;
        case 4:
            return w.conv5 + at * 5 * C2;
        default:
            return w.glu + (at * 2 + map - kGluValue) * C2;
    }
}

template <class Pointers>
inline auto bias(const Pointers& w, const SearchCell& op, int64_t task, int edge, int map) -> decltype(w.linear) {
    const int64_t C = op.width, at = (op.per_task ? task : 0) * kEdges + edge;
    switch (map) {
        case 0:
            return w.linear_bias + at * C;
        case 3:
            return w.conv3_bias + at * C;
        case 4:
            return w.conv5_bias + at * C;
        default:
            return w.glu_bias + (at * 2 + map - kGluValue) * C;
    }
}

// One cell's weights as panels of kColumns columns, padded with zeros to whole tiles.
class Packed {
  public:
    Packed(const SearchCell& op, float* memory)
        : op_(op), W_(op.inner()), D_((op.d + kColumns - 1) / kColumns * kColumns) {
        maps_ = memory;
        turned_ = maps_ + kEdges * 11 * W_ * W_;
        biases_ = turned_ + kEdges * 11 * W_ * W_;
        in_ = biases_ + kEdges * kMaps * W_;
        in_bias_ = in_ + 2 * W_ * op.d;
        in_turned_ = in_bias_ + 2 * W_;
        out_ = in_turned_ + 2 * W_ * D_;
        out_bias_ = out_ + W_ * D_;
        out_turned_ = out_bias_ + D_;
    }

    // Panels of a map: row j · W + c_in, column c_out; turned, for its input's gradient, row (taps - 1 - j) · W +
    // c_out, column c_in.
    float* map(int edge, int map, int64_t panel, bool turned) const {
        constexpr int before[kMaps] = {0, 1, 2, 3, 6};
        return (turned ? turned_ : maps_) + (edge * 11 + before[map]) * W_ * W_ + panel * kTaps[map] * W_ * kColumns;
    }
    float* bias_of(int edge, int map) const { return biases_ + (edge * kMaps + map) * W_; }
    float* in(int64_t panel) const { return in_ + panel * op_.d * kColumns; }  // d -> 2 W
    float* in_bias() const { return in_bias_; }
    float* in_turned(int64_t panel) const { return in_turned_ + panel * 2 * W_ * kColumns; }  // 2 W -> d
    float* out(int64_t panel) const { return out_ + panel * W_ * kColumns; }                  // W -> d
    float* out_bias() const { return out_bias_; }
    float* out_turned(int64_t panel) const { return out_turned_ + panel * op_.d * kColumns; }  // d -> W

    void fill_map(int64_t task, int edge, int m, bool turned) const {
        const int64_t C = op_.width;
        for (int tap = 0; tap < kTaps[m]; ++tap) {
            const float* matrix = matrices(op_.weights, op_, task, edge, m) + tap * C * C;
            const Operand b{reinterpret_cast<const char*>(matrix), turned ? C : 1, turned ? 1 : C, false};
            const int64_t at = turned ? kTaps[m] - 1 - tap : tap;
            for (int64_t panel = 0; panel * kColumns < W_; ++panel)
                part(b, C, C, panel * kColumns, W_, map(edge, m, panel, turned) + at * W_ * kColumns);
        }
        row(bias(op_.weights, op_, task, edge, m), C, W_, bias_of(edge, m));
    }
    void fill_in(int64_t task, int64_t panel) const {
        const int64_t column = panel * kColumns, which = column / W_;
        part({reinterpret_cast<const char*>(project(task, which)), 1, op_.d, false}, op_.d, op_.width,
             column - which * W_, op_.d, in(panel));
        if (column % W_ == 0)
            row(op_.weights.project_bias + (own(task) * 2 + which) * op_.width, op_.width, W_, in_bias_ + column);
    }
    void fill_in_turned(int64_t task, int64_t panel) const {
        for (int64_t which = 0; which < 2; ++which)
            part({reinterpret_cast<const char*>(project(task, which)), op_.d, 1, false}, op_.width, op_.d,
                 panel * kColumns, W_, in_turned(panel) + which * W_ * kColumns);
    }
    void fill_out(int64_t task, int64_t panel) const {
        part({reinterpret_cast<const char*>(output(task)), 1, op_.width, false}, op_.width, op_.d, panel * kColumns, W_,
             out(panel));
        if (panel == 0) row(op_.weights.output_bias + own(task) * op_.d, op_.d, D_, out_bias_);
    }
    void fill_out_turned(int64_t task, int64_t panel) const {
        part({reinterpret_cast<const char*>(output(task)), op_.width, 1, false}, op_.d, op_.width, panel * kColumns,
             op_.d, out_turned(panel));
    }

  private:
    int64_t own(int64_t task) const { return op_.per_task ? task : 0; }
    const float* project(int64_t task, int64_t which) const {
        return op_.weights.project + (own(task) * 2 + which) * op_.width * op_.d;
    }
    const float* output(int64_t task) const { return op_.weights.output + own(task) * op_.width * op_.d; }

    // kColumns columns of b [depth, columns] from `column` on, with rows of zeros up to `rows`.
    static void part(const Operand& b, int64_t depth, int64_t columns, int64_t column, int64_t rows, float* panel) {
        const int64_t some = column < columns ? smaller(kColumns, columns - column) : 0;
        if (some == 0) depth = 0;
        if (some > 0) pack(b, depth, column, some, panel);
        memset(panel + depth * kColumns, 0, static_cast<size_t>((rows - depth) * kColumns) * sizeof(float));
    }
    static void row(const float* from, int64_t count, int64_t width, float* to) {
        for (int64_t i = 0; i < width; ++i) to[i] = i < count ? from[i] : 0;
    }

    const SearchCell& op_;
    int64_t W_, D_;
    float *maps_, *turned_, *biases_, *in_, *in_bias_, *in_turned_, *out_, *out_bias_, *out_turned_;
};

// What a convolution's first tap sees, counted from its token.
inline int64_t first_tap(const SearchCell& op, int map) {
    return op.causal ? 1 - kTaps[map] : (1 - kTaps[map]) / 2;
}

// C [rows][kColumns] = init + A B with A rows of adjacent floats: one tile of any product here.
inline void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* panel, const float* init,
                     int64_t init_row, float* c, int64_t c_row) {
    outer_rows<FloatStep>(rows, depth, reinterpret_cast<const char*>(a), a_row * 4, int64_t{4}, panel,
                          int64_t{kColumns}, init, init_row, c, c_row);
}

// An affine map of an edge on a tile's tokens, before its activation: [count][kColumns] of one panel. A node that
// nothing reaches is zero and leaves the bias. Returns how many C × C products that was.
inline int64_t affine(const SearchCell& op, const Packed& packed, const float* nodes, const Reached& reached,
                      const Tile& tile, int edge, int map, int64_t panel, float* out) {
    const int64_t W = op.inner();
    const float* input = nodes + kInputOf[edge] * op.array() + (tile.row + first_tap(op, map)) * W;
    const int64_t depth = reached.node[kInputOf[edge]] ? kTaps[map] * W : 0;
    multiply(tile.count, depth, input, W, packed.map(edge, map, panel, false),
             packed.bias_of(edge, map) + panel * kColumns, 0, out, kColumns);
    return panel == 0 && depth > 0 ? tile.count * kTaps[map] : 0;
}

// Zeros where sequences of the inner arrays meet.
inline void clear_gaps(const SearchCell& op, float* array) {
    const size_t bytes = static_cast<size_t>(kGap * op.inner()) * sizeof(float);
    for (int64_t s = 0; s <= op.sequences; ++s) memset(array + (op.offsets[s] + kGap * s) * op.inner(), 0, bytes);
}

// A second thread costs a few microseconds; below this many multiplications it is not worth them.
inline int useful_threads(const SearchCell& op) {
    return op.tokens * op.d * op.width < (1 << 17) ? 1 : op.threads;
}

}  // namespace TARP_ISA
}  // namespace tarp
