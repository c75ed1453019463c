// Backward: the gradient of the mean, then from n2 back to s0 and s1. At each node dn spreads to the affine maps of its
// edges, as gradients before the activation; at each input these are gathered through the turned matrices. Then the
// gradients of the weights, each a tall-skinny sum over the tokens in their order, whatever the number of threads.
//
// Operations: twice those of forward. Operations that alpha did not select run only for dalpha, and nothing is kept.
#include "search_cell/cell.h"

namespace tarp {
namespace TARP_ISA {
namespace {

thread_local Scratch own_memory, call_memory, local_memory, tall_memory;

// What passes between the stages of a call, of all its tokens.
struct Workspace {
    float* dmean;   // [rows, W]: ∂L/∂mean / 3, which is ∂L/∂n2
    float* dn;      // [2, rows, W]: ∂L/∂n0, n1
    float* spread;  // [slots, rows, W]: gradients of the affine maps
    float* mean;    // [T, W]
    float* ds;      // [T, 2 W]: before the relu of s0 and s1
    float* dalpha;  // [strips, 54]

    Workspace(const SearchCell& op, int64_t strips, Scratch& scratch) {
        const int64_t array = op.array(), alphas = strips * kEdges * kOperations;
        dmean = scratch.floats((3 + op.slots()) * array + op.tokens * 3 * op.inner() + alphas);
        dn = dmean + array;
        spread = dn + 2 * array;
        mean = spread + op.slots() * array;
        ds = mean + op.tokens * op.inner();
        dalpha = ds + op.tokens * 2 * op.inner();
    }
};

class Backward {
  public:
    Backward(const SearchCell& op, const SearchCellBackward& io, const Packed& packed, const Workspace& work,
             const Group& group)
        : op_(op), io_(io), packed_(packed), work_(work), group_(group), W_(op.inner()) {}

    // ∂L/∂mean of a strip; the mean is kept for the output's gradient.
    void start(const Strip& strip) const {
        const Operand dout{io_.dout, op_.d, 1, op_.bf16};
        const int64_t rows = strip.end - strip.begin;
        const FloatRows left = as_floats(dout, strip.begin, rows, 0, op_.d, local(), Dropout{}, op_.d);
        float* dmean = work_.dmean + strip.row * W_;
        const float zero[kColumns] = {};
        for (int64_t column = 0; column < W_; column += kColumns)
            multiply(rows, op_.d, left.data, left.stride, packed_.out_turned(column / kColumns), zero, 0,
                     dmean + column, W_);
        for (int64_t i = 0; i < rows * W_; ++i) dmean[i] *= 1.0f / 3;
        const float* n = io_.nodes + 2 * op_.array() + strip.row * W_;
        float* mean = work_.mean + strip.begin * W_;
        for (int64_t i = 0; i < rows * W_; ++i)
            mean[i] = (n[i] + n[i + op_.array()] + n[i + 2 * op_.array()]) * (1.0f / 3);
    }

    // ∂L/∂node of a strip complete, then spread. `index`: of the strip.
    int64_t node(const Strip& strip, int64_t index, int node) const {
        const Reached reached(op_.alpha + strip.task * kEdges * kOperations);
        const int64_t rows = strip.end - strip.begin;
        int64_t products = 0;
        if (node < 2) {  // n2 is nobody's input
            float* own = dn(node) + strip.row * W_;
            memcpy(own, work_.dmean + strip.row * W_, static_cast<size_t>(rows * W_) * sizeof(float));
            if (io_.dalpha != nullptr || reached.node[2 + node]) products += gather(strip, node + 2, own, W_);
        }
        return products + spread_node(strip, index, node, reached);
    }

    // ds of a strip, and dx = ds P (+ dout).
    int64_t finish(const Strip& strip) const {
        const int64_t rows = strip.end - strip.begin;
        int64_t products = 0;
        float* ds = work_.ds + strip.begin * 2 * W_;
        memset(ds, 0, static_cast<size_t>(rows * 2 * W_) * sizeof(float));
        for (int input = 0; input < 2; ++input) {
            products += gather(strip, input, ds + input * W_, 2 * W_);
            const float* s = io_.nodes + input * op_.array() + strip.row * W_;
            for (int64_t i = 0; i < rows; ++i) {
                float* __restrict own = ds + i * 2 * W_ + input * W_;
                for (int64_t j = 0; j < W_; ++j) own[j] = s[i * W_ + j] > 0 ? own[j] : 0;
            }
        }
        if (io_.dx != nullptr)
            back_to_width(op_, strip.begin, rows, ds, 2 * W_, 2 * W_, packed_.in_turned(0), 2 * W_ * kColumns,
                          io_.residual ? io_.dout : nullptr, nullptr, io_.dx);
        return products;
    }

    // The gradients of the weights, job by job.
    void weight_gradients(const Team& team, float* transposed) const {
        constexpr int64_t kWide = 4 * kColumns;  // adjacent columns that the processor fetches ahead
        int64_t job = 0;
        for (int64_t n = 0; n < op_.d; n += kWide) {
            if (job++ % team.size != team.rank) continue;
            const Range columns{n, smaller(n + kWide, op_.d)};
            project_gradient(columns);
            output_gradient(columns, transposed);
        }
        for (int edge = 0; edge < kEdges; ++edge)
            for (int map = 0; map < kMaps; ++map)
                for (int tap = 0; group_.slot[edge][map] >= 0 && tap < kTaps[map]; ++tap)
                    if (job++ % team.size == team.rank) map_gradient(edge, map, tap);
    }

  private:
    // What the edges that read an input (s0, s1, n0, n1) add to its gradient, on top of `sum` [rows][sum_row].
    int64_t gather(const Strip& strip, int input, float* sum, int64_t sum_row) const {
        const float* alpha = op_.alpha + strip.task * kEdges * kOperations;
        const int64_t rows = strip.end - strip.begin;
        int64_t products = 0;
        for (int64_t panel = 0; panel * kColumns < W_; ++panel)
            for (int edge = 0; edge < kEdges; ++edge) {
                if (kInputOf[edge] != input) continue;
                float* own = sum + panel * kColumns;
                const float identity = alpha[edge * kOperations + 1];
                if (identity != 0) {
                    const float* from = dn(kNodeOf[edge]) + strip.row * W_ + panel * kColumns;
                    for (int64_t i = 0; i < rows; ++i) {
                        float* __restrict to = own + i * sum_row;
                        for (int64_t j = 0; j < kColumns; ++j) to[j] += identity * from[i * W_ + j];
                    }
                }
                for (int map = 0; map < kMaps; ++map) {
                    if (alpha[edge * kOperations + kOperationOf[map]] == 0) continue;
                    const int64_t row = strip.row - first_tap(op_, map) - (kTaps[map] - 1);
                    multiply(rows, kTaps[map] * W_, spread(edge, map) + row * W_, W_,
                             packed_.map(edge, map, panel, true), own, sum_row, own, sum_row);
                    if (panel == 0) products += rows * kTaps[map];
                }
            }
        return products;
    }

    // Gradients of the affine maps of a node's edges, and of alpha, from ∂L/∂node of a strip.
    int64_t spread_node(const Strip& strip, int64_t index, int node, const Reached& reached) const {
        const int64_t rows = strip.end - strip.begin;
        int64_t products = 0;
        for (int edge = 0; edge < kEdges; ++edge) {
            if (kNodeOf[edge] != node) continue;
            const float* alpha = op_.alpha + (strip.task * kEdges + edge) * kOperations;
            for (int map = 0; map < kMaps; ++map)
                if (group_.slot[edge][map] >= 0 && kOperationOf[map] != kGlu)
                    through_relu(strip, edge, map, alpha[kOperationOf[map]]);
            if (io_.dalpha == nullptr && group_.slot[edge][kGluValue] < 0) continue;
            float* dalpha = work_.dalpha + (index * kEdges + edge) * kOperations;
            if (io_.dalpha != nullptr)
                for (int m = 0; m < kOperations; ++m) dalpha[m] = 0;
            const float* input = io_.nodes + kInputOf[edge] * op_.array() + strip.row * W_;
            const auto run = [&](int map, int64_t panel, float* out) {
                products += affine(op_, packed_, input, reached.node[kInputOf[edge]], rows, edge, map, panel, out);
            };
            float *value = local(), *gate = value + rows * kColumns;
            for (int64_t panel = 0; panel * kColumns < W_; ++panel) {
                run(kGluValue, panel, value);
                run(kGluGate, panel, gate);
                for (int64_t i = 0; i < rows * kColumns; ++i) gate[i] = sigmoid(gate[i]);
                if (group_.slot[edge][kGluValue] >= 0) through_glu(strip, edge, panel, alpha[kGlu], value, gate);
                if (io_.dalpha == nullptr) continue;
                for (int64_t i = 0; i < rows * kColumns; ++i) value[i] *= gate[i];
                dalpha[kGlu] += inner_product(strip, node, panel, value, kColumns);
                dalpha[1] += inner_product(strip, node, panel, input + panel * kColumns, W_);
                for (int map = 0; map < kMaps; ++map) {
                    if (kOperationOf[map] == kGlu) continue;
                    run(map, panel, value);
                    for (int64_t i = 0; i < rows * kColumns; ++i) value[i] = value[i] > 0 ? value[i] : 0;
                    dalpha[kOperationOf[map]] += inner_product(strip, node, panel, value, kColumns);
                }
            }
        }
        return products;
    }

    void through_relu(const Strip& strip, int edge, int map, float weight) const {
        const uint8_t* active = io_.active + group_.slot[edge][map] * op_.array() + strip.row * W_;
        const float* from = dn(kNodeOf[edge]) + strip.row * W_;
        float* __restrict target = spread(edge, map) + strip.row * W_;
        const int64_t size = (strip.end - strip.begin) * W_;
        if (weight == 0)  // this task did not select it
            memset(target, 0, static_cast<size_t>(size) * sizeof(float));
        else
            for (int64_t i = 0; i < size; ++i) target[i] = active[i] ? weight * from[i] : 0;
    }

    void through_glu(const Strip& strip, int edge, int64_t panel, float weight, const float* value,
                     const float* gate) const {
        const int64_t at = strip.row * W_ + panel * kColumns;
        const float* from = dn(kNodeOf[edge]) + at;
        float *dvalue = spread(edge, kGluValue) + at, *dgate = spread(edge, kGluGate) + at;
        for (int64_t i = 0; i < strip.end - strip.begin; ++i)
            for (int64_t j = 0; j < kColumns; ++j) {
                const float g = gate[i * kColumns + j], d = weight * from[i * W_ + j];
                dvalue[i * W_ + j] = d * g;
                dgate[i * W_ + j] = d * value[i * kColumns + j] * g * (1 - g);
            }
    }

    float inner_product(const Strip& strip, int node, int64_t panel, const float* value, int64_t row) const {
        const float* d = dn(node) + strip.row * W_ + panel * kColumns;
        float sums[kColumns] = {}, sum = 0;
        for (int64_t i = 0; i < strip.end - strip.begin; ++i)
            for (int64_t j = 0; j < kColumns; ++j) sums[j] += d[i * W_ + j] * value[i * row + j];
        for (int64_t j = 0; j < kColumns; ++j) sum += sums[j];
        return sum;
    }

    // The gradient of one tap of a map, and with the first tap of its bias.
    void map_gradient(int edge, int map, int tap) const {
        const int64_t C = op_.width, rows = group_.rows.end - group_.rows.begin;
        float* matrix = matrices(io_.gradients, op_, group_.first_task, edge, map);
        float* sums = bias(io_.gradients, op_, group_.first_task, edge, map);
        const float* d = spread(edge, map) + group_.rows.begin * W_;
        const Operand input{reinterpret_cast<const char*>(io_.nodes + kInputOf[edge] * op_.array()), W_, 1, false};
        if (wanted(io_.gradients, map, false) && input_reached(edge))
            tall(input, group_.rows.begin + first_tap(op_, map) + tap, rows, {0, C}, d, C, W_, matrix + tap * C * C, C,
                 Dropout{}, C, tall_memory);
        if (tap == 0 && wanted(io_.gradients, map, true)) sum_rows(d, W_, rows, C, sums);
    }
    // Columns of d of the gradients of both projections.
    void project_gradient(Range columns) const {
        const int64_t C = op_.width, T = group_.tokens.end - group_.tokens.begin;
        const int64_t task = op_.per_task ? group_.first_task : 0;
        const float* ds = work_.ds + group_.tokens.begin * 2 * W_;
        const Operand x{op_.x, op_.d, 1, op_.bf16};
        const int64_t together = C == W_ ? 2 : 1;  // both are one matrix of 2 C rows
        for (int64_t which = 0; which < 2 && io_.gradients.project != nullptr; which += together)
            tall(x, group_.tokens.begin, T, columns, ds + which * W_, together * C, 2 * W_,
                 io_.gradients.project + (task * 2 + which) * C * op_.d, op_.d, Dropout{}, op_.d, tall_memory);
        for (int64_t which = 0; which < 2 && columns.begin == 0 && io_.gradients.project_bias != nullptr; ++which)
            sum_rows(ds + which * W_, 2 * W_, T, C, io_.gradients.project_bias + (task * 2 + which) * C);
    }
    // Columns of d of the gradient of the output, by way of its transpose [C, d].
    void output_gradient(Range columns, float* transposed) const {
        const int64_t C = op_.width, T = group_.tokens.end - group_.tokens.begin;
        const int64_t task = op_.per_task ? group_.first_task : 0;
        const Operand dout{io_.dout, op_.d, 1, op_.bf16};
        if (io_.gradients.output != nullptr) {
            tall(dout, group_.tokens.begin, T, columns, work_.mean + group_.tokens.begin * W_, C, W_, transposed, op_.d,
                 Dropout{}, op_.d, tall_memory);
            float* target = io_.gradients.output + task * op_.d * C;
            for (int64_t n = columns.begin; n < columns.end; ++n)
                for (int64_t c = 0; c < C; ++c) target[n * C + c] = transposed[c * op_.d + n];
        }
        if (io_.gradients.output_bias == nullptr) return;
        const int64_t wide = columns.end - columns.begin;
        float* __restrict sums = io_.gradients.output_bias + task * op_.d + columns.begin;
        memset(sums, 0, static_cast<size_t>(wide) * sizeof(float));
        for (int64_t t = group_.tokens.begin; t < group_.tokens.end; ++t) {
            const FloatRows row = as_floats(dout, t, 1, columns.begin, wide, local(), Dropout{}, op_.d);
            for (int64_t n = 0; n < wide; ++n) sums[n] += row.data[n];
        }
    }
    static void sum_rows(const float* a, int64_t a_row, int64_t rows, int64_t columns, float* __restrict sums) {
        memset(sums, 0, static_cast<size_t>(columns) * sizeof(float));
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t j = 0; j < columns; ++j) sums[j] += a[t * a_row + j];
    }
    bool input_reached(int edge) const {
        for (int64_t task = group_.first_task; task < group_.last_task; ++task)
            if (Reached(op_.alpha + task * kEdges * kOperations).node[kInputOf[edge]]) return true;
        return false;
    }
    static bool wanted(const CellGradientPointers& g, int map, bool of_bias) {
        const float* pointers[kMaps][2] = {{g.linear, g.linear_bias},
                                           {g.glu, g.glu_bias},
                                           {g.glu, g.glu_bias},
                                           {g.conv3, g.conv3_bias},
                                           {g.conv5, g.conv5_bias}};
        return pointers[map][of_bias] != nullptr;
    }

    float* dn(int node) const { return node == 2 ? work_.dmean : work_.dn + node * op_.array(); }
    float* spread(int edge, int map) const { return work_.spread + group_.slot[edge][map] * op_.array(); }
    float* local() const { return local_memory.floats(kStrip * (2 * kColumns + op_.d)); }

    const SearchCell& op_;
    const SearchCellBackward& io_;
    const Packed& packed_;
    const Workspace& work_;
    const Group& group_;
    int64_t W_;
};

// glu runs again in backward, every operation where alpha asks for its gradient.
Packed packed_layout(const SearchCell& op, bool every) {
    Packed layout(op);
    for (int edge = 0; edge < kEdges; ++edge)
        for (int map = 0; map < kMaps; ++map) {
            const bool selected = some_task_selects(op, 0, op.tasks, edge, kOperationOf[map]);
            if (selected) layout.add(edge, map, true);
            if (every || (selected && kOperationOf[map] == kGlu)) layout.add(edge, map, false);
        }
    return layout;
}

void pack_weights(const SearchCell& op, const Packed& packed, const Group& group, const Team& team, bool every) {
    const int64_t inner = op.inner() / kColumns, outer = (op.d + kColumns - 1) / kColumns, task = group.first_task;
    for (int64_t i = team.rank; i < inner + outer + kEdges * kMaps; i += team.size) {
        const int edge = static_cast<int>(i - inner - outer) / kMaps, map = static_cast<int>(i - inner - outer) % kMaps;
        if (i < inner)
            packed.fill_out_turned(task, i);
        else if (i < inner + outer)
            packed.fill_in_turned(task, i - inner);
        else
            for (const bool turned : {true, false})
                if (packed.has(edge, map, turned) && (group.slot[edge][map] >= 0 || (every && !turned)))
                    packed.fill_map(task, edge, map, turned);
    }
}

// The sums over each task's strips in their order.
void sum_dalpha(const SearchCell& op, const SearchCellBackward& io, const Workspace& work,
                const std::vector<Strip>& strips) {
    constexpr int kAll = kEdges * kOperations;
    for (int i = 0; i < kAll; ++i) {
        std::vector<double> sums(static_cast<size_t>(op.tasks));
        for (size_t s = 0; s < strips.size(); ++s)
            sums[static_cast<size_t>(strips[s].task)] += static_cast<double>(work.dalpha[s * kAll + i]);
        for (int64_t task = 0; task < op.tasks; ++task)
            io.dalpha[task * kAll + i] = static_cast<float>(sums[static_cast<size_t>(task)]);
    }
}

}  // namespace

int64_t search_cell_backward(const SearchCell& op, const SearchCellBackward& io) {
    const std::vector<Strip> strips = strips_of(op);
    const Workspace work(op, static_cast<int64_t>(strips.size()), call_memory);
    for (int64_t slot = 0; slot < op.slots(); ++slot) clear_gaps(op, work.spread + slot * op.array());
    const Packed layout = packed_layout(op, io.dalpha != nullptr);
    const int64_t floats = layout.floats() + op.width * op.d;
    const int64_t products =
        for_groups(op, strips, floats, own_memory, [&](const Group& group, const Team& team, float* memory) {
            const Packed packed = layout.in_memory(memory);
            const Backward backward(op, io, packed, work, group);
            int64_t count = 0;
            const auto stage = [&](const auto& run) {
                for (int64_t i = group.strips.begin + team.rank; i < group.strips.end; i += team.size)
                    count += run(strips[static_cast<size_t>(i)], i);
                team.wait();
            };
            pack_weights(op, packed, group, team, io.dalpha != nullptr);
            team.wait();
            stage([&](const Strip& strip, int64_t i) {
                backward.start(strip);
                return backward.node(strip, i, 2);
            });
            stage([&](const Strip& strip, int64_t i) { return backward.node(strip, i, 1); });
            stage([&](const Strip& strip, int64_t i) { return backward.node(strip, i, 0); });
            stage([&](const Strip& strip, int64_t) { return backward.finish(strip); });
            backward.weight_gradients(team, memory + layout.floats());
            return count;
        });
    if (io.dalpha != nullptr) sum_dalpha(op, io, work, strips);
    call_memory.keep_at_most(kKept);
    own_memory.keep_at_most(kKept);
    return products;
}

}  // namespace TARP_ISA
}  // namespace tarp
