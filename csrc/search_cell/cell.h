// What forward and backward share: the tokens of a call in strips, the cells whose weights are packed, the threads that
// share a cell, one affine map.
#pragma once

#include <math.h>
#include <omp.h>

#include <vector>

#include "common/products.h"
#include "search_cell/search_cell.h"

namespace tarp {
namespace TARP_ISA {

// Up to kStrip tokens of one sequence: what one thread takes through a stage. A panel of weights stays in the
// first-level cache while all of a strip passes by; the strip's inner rows stay in the second.
constexpr int64_t kStrip = 128;

struct Strip {
    int64_t task, sequence, begin, end;  // tokens
    int64_t row;                         // of the first token in an inner array of the whole call
};

// Sequences are cut evenly, so a strip that is not its sequence's only one has more tokens than a convolution sees.
inline std::vector<Strip> strips_of(const SearchCell& op) {
    std::vector<Strip> strips;
    for (int64_t task = 0; task < op.tasks; ++task)
        for (int64_t s = op.task_sequences[task]; s < op.task_sequences[task + 1]; ++s) {
            const int64_t begin = op.offsets[s], length = op.offsets[s + 1] - begin;
            const int64_t count = (length + kStrip - 1) / kStrip;
            for (int64_t i = 0; i < count; ++i) {
                const int64_t from = begin + length * i / count;
                strips.push_back({task, s, from, begin + length * (i + 1) / count, from + kGap * (s + 1)});
            }
        }
    return strips;
}

inline bool some_task_selects(const SearchCell& op, int64_t first, int64_t last, int edge, int m) {
    for (int64_t task = first; task < last; ++task)
        if (op.alpha[(task * kEdges + edge) * kOperations + m] != 0) return true;
    return false;
}

// The tasks that share one cell's weights: all of them, or one.
struct Group {
    int64_t first_task, last_task;
    Range strips, tokens, rows;
    bool selected[kEdges][kOperations];  // by some task
    int slot[kEdges][kMaps];             // of the maps that are selected; others -1

    Group(const SearchCell& op, const std::vector<Strip>& all, int64_t index)
        : first_task(op.per_task ? index : 0), last_task(op.per_task ? index + 1 : op.tasks) {
        const int64_t first = op.task_sequences[first_task], last = op.task_sequences[last_task];
        const int64_t count = static_cast<int64_t>(all.size());
        tokens = {op.offsets[first], op.offsets[last]};
        rows = {tokens.begin + kGap * (first + 1), tokens.end + kGap * (last < first + 1 ? first + 1 : last)};
        strips = {0, 0};
        while (strips.begin < count && all[strips.begin].task < first_task) ++strips.begin;
        strips.end = strips.begin;
        while (strips.end < count && all[strips.end].task < last_task) ++strips.end;
        int next = 0;  // slots are numbered over the maps that any group selects
        for (int edge = 0; edge < kEdges; ++edge) {
            for (int m = 0; m < kOperations; ++m)
                selected[edge][m] = some_task_selects(op, first_task, last_task, edge, m);
            for (int map = 0; map < kMaps; ++map) {
                const int own = some_task_selects(op, 0, op.tasks, edge, kOperationOf[map]) ? next++ : -1;
                slot[edge][map] = selected[edge][kOperationOf[map]] ? own : -1;
            }
        }
    }
};

constexpr int64_t kKept = 32 << 20;  // bytes of each scratch memory that outlive a call

inline int64_t groups(const SearchCell& op) {
    return op.per_task ? op.tasks : 1;
}

// The threads that work on one group: each takes every size-th thing, and they wait for each other between stages.
struct Team {
    int rank, size;

    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// A second thread costs a few microseconds; below this many multiplications it is not worth them.
inline int useful_threads(const SearchCell& op) {
    return op.tokens * op.d * op.width < (1 << 17) ? 1 : op.threads;
}

// Whether there are cells enough for every thread to have its own, with nobody to wait for.
inline bool apart(const SearchCell& op) {
    return op.per_task && op.tasks >= useful_threads(op);
}

// Calls work(group, team, memory) for every group; `memory` is `floats` long and the team's own. Returns the sum.
template <class Work>
inline int64_t for_groups(const SearchCell& op, const std::vector<Strip>& strips, int64_t floats, Scratch& scratch,
                          const Work& work) {
    const int threads = useful_threads(op);
    float* memory = scratch.floats(floats * (apart(op) ? threads : 1));
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int rank = omp_get_thread_num(), size = omp_get_num_threads();
        const auto one = [&](int64_t index, Team team, float* own) {
            const Group group(op, strips, index);
            return group.strips.begin == group.strips.end ? 0 : work(group, team, own);
        };
        if (apart(op)) {
#pragma omp for schedule(dynamic)
            for (int64_t index = 0; index < groups(op); ++index)
                total += one(index, Team{0, 1}, memory + rank * floats);
        } else {
            for (int64_t index = 0; index < groups(op); ++index) {
                total += one(index, Team{rank, size}, memory);
                Team{rank, size}.wait();  // the memory serves the next group
            }
        }
    }
    return total;
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

// One cell's weights as panels of kColumns columns, padded with zeros to whole tiles. Maps are asked for by `add`
// first, and take memory only then.
class Packed {
  public:
    explicit Packed(const SearchCell& op) : op_(op), W_(op.inner()), D_((op.d + kColumns - 1) / kColumns * kColumns) {
        for (int edge = 0; edge < kEdges; ++edge)
            for (int map = 0; map < kMaps; ++map) at_[edge][map][0] = at_[edge][map][1] = -1;
    }

    // Panels of a map: row j · W + c_in, column c_out; turned, for its input's gradient, row (taps - 1 - j) · W +
    // c_out, column c_in.
    float* map(int edge, int map, int64_t panel, bool turned) const {
        return memory_ + at_[edge][map][turned] + panel * kTaps[map] * W_ * kColumns;
    }
    float* bias_of(int edge, int map) const { return memory_ + (edge * kMaps + map) * W_; }
    float* in_bias() const { return memory_ + kEdges * kMaps * W_; }                                      // [2 W]
    float* out_bias() const { return in_bias() + 2 * W_; }                                                // [D]
    float* in(int64_t panel) const { return out_bias() + D_ + panel * op_.d * kColumns; }                 // d -> 2 W
    float* out(int64_t panel) const { return out_bias() + D_ + 2 * W_ * op_.d + panel * W_ * kColumns; }  // W -> d
    // The same two for gradients, in the same memory: a pass needs one pair.
    float* in_turned(int64_t panel) const { return out_bias() + D_ + panel * 2 * W_ * kColumns; }  // 2 W -> d
    float* out_turned(int64_t panel) const { return in_turned(0) + 2 * W_ * D_ + panel * op_.d * kColumns; }  // d -> W

    void add(int edge, int map, bool turned) {
        at_[edge][map][turned] = floats_;
        floats_ += kTaps[map] * W_ * W_;
    }
    bool has(int edge, int map, bool turned) const { return at_[edge][map][turned] >= 0; }
    int64_t floats() const { return floats_; }
    Packed in_memory(float* memory) const {
        Packed other = *this;
        other.memory_ = memory;
        return other;
    }

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
            row(op_.weights.project_bias + (own(task) * 2 + which) * op_.width, op_.width, W_, in_bias() + column);
    }
    void fill_in_turned(int64_t task, int64_t panel) const {
        for (int64_t which = 0; which < 2; ++which)
            part({reinterpret_cast<const char*>(project(task, which)), op_.d, 1, false}, op_.width, op_.d,
                 panel * kColumns, W_, in_turned(panel) + which * W_ * kColumns);
    }
    void fill_out(int64_t task, int64_t panel) const {
        part({reinterpret_cast<const char*>(output(task)), 1, op_.width, false}, op_.width, op_.d, panel * kColumns, W_,
             out(panel));
        if (panel == 0) row(op_.weights.output_bias + own(task) * op_.d, op_.d, D_, out_bias());
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
    int64_t at_[kEdges][kMaps][2];
    int64_t floats_ = (kEdges * kMaps + 2) * W_ + D_ + 3 * W_ * D_;
    float* memory_ = nullptr;
};

// What a convolution's first tap sees, counted from its token.
inline int64_t first_tap(const SearchCell& op, int map) {
    return op.causal ? 1 - kTaps[map] : (1 - kTaps[map]) / 2;
}

// C [rows][kColumns] = init + A B with A rows of adjacent floats: one panel of any product here.
inline void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* panel, const float* init,
                     int64_t init_row, float* c, int64_t c_row) {
    for (int64_t m = 0; m < rows; m += kRows)
        outer_rows<FloatStep>(smaller(kRows, rows - m), depth, reinterpret_cast<const char*>(a + m * a_row), a_row * 4,
                              int64_t{4}, panel, int64_t{kColumns}, init + m * init_row, init_row, c + m * c_row,
                              c_row);
}

// An affine map of an edge on rows of its input, before its activation: [rows][kColumns] of one panel. A node that
// nothing reaches is zero and leaves the bias. Returns how many C × C products that was.
inline int64_t affine(const SearchCell& op, const Packed& packed, const float* input, bool reached, int64_t rows,
                      int edge, int map, int64_t panel, float* out) {
    const int64_t W = op.inner(), depth = reached ? kTaps[map] * W : 0;
    multiply(rows, depth, input + first_tap(op, map) * W, W, packed.map(edge, map, panel, false),
             packed.bias_of(edge, map) + panel * kColumns, 0, out, kColumns);
    return panel == 0 && depth > 0 ? rows * kTaps[map] : 0;
}

// Rows of x's width from inner ones, rounded once: target = base + bias + A B, with A [rows][a_row] and B in panels of
// `depth` rows. base, like x, and bias may be null. Tile after tile: every page of base and target is passed once.
inline void back_to_width(const SearchCell& op, int64_t token, int64_t rows, const float* a, int64_t a_row,
                          int64_t depth, const float* panels, int64_t panel, const char* base, const float* bias,
                          char* target) {
    const int64_t element = op.bf16 ? 2 : 4;
    for (int64_t m = 0; m < rows; m += kRows)
        for (int64_t column = 0; column < op.d; column += kColumns) {
            const int64_t count = smaller(kRows, rows - m), some = smaller(kColumns, op.d - column);
            float tile[kRows * kColumns] = {};
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = ((token + m + i) * op.d + column) * element;
                float* row = tile + i * kColumns;
                if (base != nullptr && op.bf16)
                    widen_row(reinterpret_cast<const uint16_t*>(base + at), some, row);
                else if (base != nullptr)
                    memcpy(row, base + at, static_cast<size_t>(some) * sizeof(float));
                for (int64_t j = 0; bias != nullptr && j < kColumns; ++j) row[j] += bias[column + j];
            }
            char* to = target + ((token + m) * op.d + column) * element;
            const bool direct = !op.bf16 && some == kColumns;
            multiply(count, depth, a + m * a_row, a_row, panels + column / kColumns * panel, tile, kColumns,
                     direct ? reinterpret_cast<float*>(to) : tile, direct ? op.d : kColumns);
            for (int64_t i = 0; i < count && !direct; ++i)
                if (op.bf16)
                    narrow_row(tile + i * kColumns, some, reinterpret_cast<uint16_t*>(to + i * op.d * element));
                else
                    memcpy(to + i * op.d * element, tile + i * kColumns, static_cast<size_t>(some) * sizeof(float));
        }
}

// Zeros where sequences of the inner arrays meet.
inline void clear_gaps(const SearchCell& op, float* array) {
    const size_t bytes = static_cast<size_t>(kGap * op.inner()) * sizeof(float);
    for (int64_t s = 0; s <= op.sequences; ++s) memset(array + (op.offsets[s] + kGap * s) * op.inner(), 0, bytes);
}

}  // namespace TARP_ISA
}  // namespace tarp
