// Forward: one pass over strips of tokens. A strip goes from h to out on one thread; what lies between, s0, s1, n0, n1,
// n2, stays in that thread's cache, with a halo: the rows around the strip that its convolutions see are computed
// again, which is 4 of 128 for each convolution on the longest way from s to out. What backward needs is copied out.
//
// Operations for each token: 2 · 3 d C for the projections, 2 C² for every tap and matrix that alpha selects. For the
// dominant published cell at d = 768, C = 64: 295 k and 188 k, which is the floor; all six operations take 811 k
// instead of the latter. Bytes: h is read and out written once, 6 KB a token in float32, 79 operations for each byte:
// the arithmetic binds.
#include "search_cell/cell.h"

namespace tarp {
namespace TARP_ISA {
namespace {

thread_local Scratch packed_memory, local_memory;

// Rows that a strip needs in front of itself and behind, of s0, s1, n0, n1, n2.
struct Halo {
    int64_t left[2 + kNodes] = {}, right[2 + kNodes] = {};
    bool read[2 + kNodes] = {};  // by some edge

    Halo(const SearchCell& op, const float* alpha) {
        for (int edge = kEdges - 1; edge >= 0; --edge) {  // a node's readers before the node
            const int node = 2 + kNodeOf[edge], input = kInputOf[edge];
            for (int map = 0; map < kMaps; ++map) {
                if (alpha[edge * kOperations + kOperationOf[map]] == 0) continue;
                read[input] = true;
                widen(left[input], left[node] - first_tap(op, map));
                widen(right[input], right[node] + first_tap(op, map) + kTaps[map] - 1);
            }
            if (alpha[edge * kOperations + 1] == 0) continue;
            read[input] = true;
            widen(left[input], left[node]);
            widen(right[input], right[node]);
        }
    }

  private:
    static void widen(int64_t& rows, int64_t to) {
        if (rows < to) rows = to;
    }
};

constexpr int64_t kHalo = 12;  // three convolutions of five taps, all to one side
constexpr int64_t kLocalRows = kStrip + 2 * (kHalo + kGap);

class Forward {
  public:
    Forward(const SearchCell& op, const SearchCellForward& io, const Packed& packed, const Group& group,
            const Strip& strip)
        : op_(op),
          io_(io),
          packed_(packed),
          group_(group),
          strip_(strip),
          alpha_(op.alpha + strip.task * kEdges * kOperations),
          reached_(alpha_),
          halo_(op, alpha_),
          W_(op.inner()) {
        nodes_ = local_memory.floats((2 + kNodes) * kLocalRows * W_ + kLocalRows * (2 * kColumns + op.d));
        buffer_ = nodes_ + (2 + kNodes) * kLocalRows * W_;
    }

    int64_t run() const {
        int64_t products = 0;
        project();
        for (int node = 0; node < kNodes; ++node) products += mix(node);
        output();
        if (io_.nodes != nullptr) keep();
        if (io_.state_after != nullptr && strip_.end == op_.offsets[strip_.sequence + 1]) leave_state();
        return products;
    }

  private:
    // The tokens whose row of an array this strip computes.
    Range tokens(int array) const {
        const int64_t begin = strip_.begin - halo_.left[array], end = strip_.end + halo_.right[array];
        const int64_t first = op_.offsets[strip_.sequence], last = op_.offsets[strip_.sequence + 1];
        return {begin > first ? begin : first, smaller(end, last)};
    }
    float* at(int array, int64_t token) const {
        return nodes_ + (array * kLocalRows + kHalo + kGap + token - strip_.begin) * W_;
    }

    // What convolutions see beyond the ends of the sequence: zeros, or the state in front.
    void surround(int array) const {
        const int64_t first = op_.offsets[strip_.sequence], last = op_.offsets[strip_.sequence + 1], C = op_.width;
        const Range own = tokens(array);
        const size_t gap = static_cast<size_t>(kGap * W_) * sizeof(float);
        if (own.end == last) memset(at(array, last), 0, gap);
        if (own.begin != first) return;
        memset(at(array, first - kGap), 0, gap);
        if (io_.state == nullptr || array == 4) return;
        const float* before = io_.state + (strip_.sequence * 4 + array) * kGap * C;
        for (int64_t i = 0; i < kGap; ++i)
            memcpy(at(array, first - kGap + i), before + i * C, static_cast<size_t>(C) * sizeof(float));
    }

    // s0, s1 = relu(x Pᵀ + b).
    void project() const {
        const Operand x{op_.x, op_.d, 1, op_.bf16};
        for (int which = 0; which < 2; ++which) {
            if (!halo_.read[which] && io_.nodes == nullptr && io_.state_after == nullptr) continue;
            surround(which);
            const Range own = tokens(which);
            const int64_t rows = own.end - own.begin;
            const FloatRows left = as_floats(x, own.begin, rows, 0, op_.d, buffer_, Dropout{}, op_.d);
            float* s = at(which, own.begin);
            for (int64_t column = 0; column < W_; column += kColumns)
                multiply(rows, op_.d, left.data, left.stride, packed_.in((which * W_ + column) / kColumns),
                         packed_.in_bias() + which * W_ + column, 0, s + column, W_);
            for (int64_t i = 0; i < rows * W_; ++i) s[i] = s[i] > 0 ? s[i] : 0;
        }
    }

    // A node: Σ alpha · op(input) over its edges, panel by panel.
    int64_t mix(int node) const {
        const int array = 2 + node;
        const Range own = tokens(array);
        const int64_t rows = own.end - own.begin;
        surround(array);
        memset(at(array, own.begin), 0, static_cast<size_t>(rows * W_) * sizeof(float));
        int64_t products = 0;
        for (int64_t panel = 0; panel * kColumns < W_; ++panel)
            for (int edge = 0; edge < kEdges; ++edge) {
                if (kNodeOf[edge] != node) continue;
                const float* input = at(kInputOf[edge], own.begin);
                float* sum = at(array, own.begin) + panel * kColumns;
                const float* weight = alpha_ + edge * kOperations;
                if (weight[1] != 0 && reached_.node[kInputOf[edge]])
                    add(rows, weight[1], sum, input + panel * kColumns, W_, [](float value) { return value; });
                if (weight[kGlu] != 0) {
                    float* gate = buffer_ + rows * kColumns;
                    products += affine_of(input, rows, edge, kGluValue, panel, buffer_);
                    products += affine_of(input, rows, edge, kGluGate, panel, gate);
                    for (int64_t i = 0; i < rows * kColumns; ++i) buffer_[i] *= sigmoid(gate[i]);
                    add(rows, weight[kGlu], sum, buffer_, kColumns, [](float value) { return value; });
                }
                for (int map = 0; map < kMaps; ++map) {
                    const float own_weight = weight[kOperationOf[map]];
                    if (own_weight == 0 || kOperationOf[map] == kGlu) continue;
                    products += affine_of(input, rows, edge, map, panel, buffer_);
                    add(rows, own_weight, sum, buffer_, kColumns, [](float value) { return value > 0 ? value : 0; });
                    if (io_.active != nullptr) keep_active(edge, map, panel, strip_.begin - own.begin);
                }
            }
        return products;
    }

    int64_t affine_of(const float* input, int64_t rows, int edge, int map, int64_t panel, float* out) const {
        return affine(op_, packed_, input, reached_.node[kInputOf[edge]], rows, edge, map, panel, out);
    }

    // sum += weight · f(value) on a panel's columns.
    template <class Function>
    void add(int64_t rows, float weight, float* sum, const float* value, int64_t value_row, const Function& f) const {
        for (int64_t i = 0; i < rows; ++i) {
            float* __restrict to = sum + i * W_;
            const float* __restrict from = value + i * value_row;
            for (int64_t j = 0; j < kColumns; ++j) to[j] += weight * f(from[j]);
        }
    }

    // out = h + b + mean Oᵀ.
    void output() const {
        const bool any = reached_.node[2] || reached_.node[3] || reached_.node[4];
        const int64_t rows = strip_.end - strip_.begin;
        float* mean = at(4, strip_.begin);  // n2 has no reader left but `keep_array`
        const float *n0 = at(2, strip_.begin), *n1 = at(3, strip_.begin), *n2 = at(4, strip_.begin);
        if (io_.nodes != nullptr) keep_array(4);
        for (int64_t i = 0; any && i < rows * W_; ++i) mean[i] = (n0[i] + n1[i] + n2[i]) * (1.0f / 3);
        back_to_width(op_, strip_.begin, rows, mean, W_, any ? W_ : 0, packed_.out(0), W_ * kColumns, op_.h,
                      packed_.out_bias(), io_.out);
    }

    // --- what others need ----------------------------------------------------------------------------------------

    void keep() const {
        for (int array = 0; array < 4; ++array) keep_array(array);
    }
    void keep_array(int array) const {
        memcpy(io_.nodes + array * op_.array() + strip_.row * W_, at(array, strip_.begin),
               static_cast<size_t>((strip_.end - strip_.begin) * W_) * sizeof(float));
    }
    // Where the values in buffer_ are positive, of the strip's own rows.
    void keep_active(int edge, int map, int64_t panel, int64_t skipped) const {
        uint8_t* active = io_.active + group_.slot[edge][map] * op_.array() + strip_.row * W_ + panel * kColumns;
        const float* value = buffer_ + skipped * kColumns;
        for (int64_t i = 0; i < strip_.end - strip_.begin; ++i)
            for (int64_t j = 0; j < kColumns; ++j) active[i * W_ + j] = value[i * kColumns + j] > 0;
    }
    void leave_state() const {
        const int64_t C = op_.width;
        for (int array = 0; array < 4; ++array)
            for (int64_t i = 0; i < kGap; ++i)
                memcpy(io_.state_after + ((strip_.sequence * 4 + array) * kGap + i) * C,
                       at(array, strip_.end - kGap + i), static_cast<size_t>(C) * sizeof(float));
    }

    const SearchCell& op_;
    const SearchCellForward& io_;
    const Packed& packed_;
    const Group& group_;
    const Strip& strip_;
    const float* alpha_;
    const Reached reached_;
    const Halo halo_;
    int64_t W_;
    float *nodes_, *buffer_;
};

void keep_states_of_empty_sequences(const SearchCell& op, const SearchCellForward& io) {
    const int64_t size = 4 * kGap * op.width;
    for (int64_t s = 0; s < op.sequences; ++s) {
        if (op.offsets[s] != op.offsets[s + 1]) continue;
        for (int64_t i = 0; i < size; ++i)
            io.state_after[s * size + i] = io.state == nullptr ? 0 : io.state[s * size + i];
    }
}

void pack_weights(const SearchCell& op, const Packed& packed, const Group& group, const Team& team) {
    const int64_t inner = 2 * op.inner() / kColumns, outer = (op.d + kColumns - 1) / kColumns, task = group.first_task;
    for (int64_t i = team.rank; i < inner + outer + kEdges * kMaps; i += team.size) {
        const int edge = static_cast<int>(i - inner - outer) / kMaps, map = static_cast<int>(i - inner - outer) % kMaps;
        if (i < inner)
            packed.fill_in(task, i);
        else if (i < inner + outer)
            packed.fill_out(task, i - inner);
        else if (group.slot[edge][map] >= 0)
            packed.fill_map(task, edge, map, false);
    }
}

}  // namespace

int64_t search_cell_forward(const SearchCell& op, const SearchCellForward& io) {
    const std::vector<Strip> strips = strips_of(op);
    Packed layout(op);
    for (int edge = 0; edge < kEdges; ++edge)
        for (int map = 0; map < kMaps; ++map)
            if (some_task_selects(op, 0, op.tasks, edge, kOperationOf[map])) layout.add(edge, map, false);
    if (io.nodes != nullptr)
        for (int array = 0; array < 2 + kNodes; ++array) clear_gaps(op, io.nodes + array * op.array());
    if (io.state_after != nullptr) keep_states_of_empty_sequences(op, io);
    const int64_t products = for_groups(
        op, strips, layout.floats(), packed_memory, [&](const Group& group, const Team& team, float* memory) {
            const Packed packed = layout.in_memory(memory);
            pack_weights(op, packed, group, team);
            team.wait();
            int64_t count = 0;
            for (int64_t i = group.strips.begin + team.rank; i < group.strips.end; i += team.size)
                count += Forward(op, io, packed, group, strips[static_cast<size_t>(i)]).run();
            return count;
        });
    packed_memory.keep_at_most(kKept);
    return products;
}

}  // namespace TARP_ISA
}  // namespace tarp
