// Forward: z [T, r] by a skinny product over the rows of x, then the dense product, whose tiles start from b + z Uᵀ.
// Backward mirrors it: dz by a skinny product over dy, then dx with tiles that start from [dh, du][V; w1], and the
// adapter's gradients as tall-skinny products.
//
// Operations: 2 T N K of the dense product; forward adds 2 T (r + S)(K) + 2 T r N, backward 4 T r N + 4 T (r + S) K.
// Bytes: x and dy are read once more than the dense product reads them. Operations bind from about 10 rows on, W's
// bytes below.
#include <omp.h>

#include "common/products.h"
#include "lowrank_linear/factor_gradients.h"
#include "lowrank_linear/middle.h"

namespace tarp {
namespace TARP_ISA {
namespace {

thread_local Scratch panels, rows_scratch, seed_scratch;

// Rows are sorted by task; calls visit(task, begin, end) for every task's part of [from, to), without segments once.
template <class Visit>
inline void each_task(const LowrankLinear& op, int64_t from, int64_t to, Visit visit) {
    if (op.segments == nullptr) {
        if (from < to) visit(int64_t{0}, from, to);
        return;
    }
    int64_t low = 0, high = op.tasks;  // the first task that ends beyond `from`
    while (low < high) {
        const int64_t mid = (low + high) / 2;
        if (op.segments[mid + 1] > from)
            high = mid;
        else
            low = mid + 1;
    }
    for (int64_t task = low; task < op.tasks && op.segments[task] < to; ++task) {
        const int64_t begin = op.segments[task] < from ? from : op.segments[task];
        const int64_t end = smaller(op.segments[task + 1], to);
        if (begin < end) visit(task, begin, end);
    }
}

Operand input(const LowrankLinear& op) {
    return {op.x, op.x_row, 1, op.bf16, op.x_index};
}

Operand cotangent(const LowrankLinear& op, const LowrankLinearBackward& io) {
    return {io.dy, io.dy_row, 1, op.bf16, op.y_index};
}

Dropout dropout(const LowrankLinear& op) {
    Dropout drop;
    drop.threshold = op.drop_threshold;
    drop.seed = op.drop_seed;
    drop.scale = static_cast<float>(1 / (1 - static_cast<double>(op.drop_threshold) / 4294967296.0));
    return drop;
}

// What a dense tile starts from: bias + Z P, where P stacks up to two matrices of the row's task.
class LowrankSeed {
  public:
    struct Part {
        Operand matrix;  // of task 0: [depth, columns]
        int64_t depth, task_stride;
    };

    LowrankSeed(const LowrankLinear& op, const float* z, int64_t columns, const Operand* bias, Part a, Part b,
                Dropout drop)
        : op_(op), z_(z), columns_(columns), bias_(bias), parts_{a, b}, depth_(a.depth + b.depth), drop_(drop) {}

    void begin(int64_t column, int64_t count) {
        column_ = column;
        memory_ = seed_scratch.floats(count * (depth_ + 1) * kColumns);
        for (int64_t p = 0; p < count; ++p) {
            packed_[p] = -1;
            float* start = bias_panel(p);
            const int64_t some = smaller(kColumns, columns_ - column - p * kColumns);
            for (int64_t n = 0; n < kColumns; ++n)
                start[n] = bias_ != nullptr && n < some ? bias_->value(0, column + p * kColumns + n) : 0;
        }
    }

    void fill(int64_t p, int64_t row, int64_t rows, float* tile) {
        float* panel = bias_panel(p) + kColumns;
        const int64_t column = column_ + p * kColumns, some = smaller(kColumns, columns_ - column);
        each_task(op_, row, row + rows, [&](int64_t task, int64_t begin, int64_t end) {
            if (packed_[p] != task) {
                float* target = panel;
                for (const Part& part : parts_) {
                    Operand matrix = part.matrix;
                    matrix.data += task * part.task_stride * 4;
                    pack(matrix, part.depth, column, some, target);
                    target += part.depth * kColumns;
                }
                packed_[p] = task;
            }
            outer_rows<FloatStep>(end - begin, depth_, reinterpret_cast<const char*>(z_ + begin * depth_), depth_ * 4,
                                  int64_t{4}, static_cast<const float*>(panel), int64_t{kColumns},
                                  static_cast<const float*>(bias_panel(p)), int64_t{0}, tile + (begin - row) * kColumns,
                                  int64_t{kColumns});
        });
        if (drop_.threshold != 0)
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t n = 0; n < some; ++n)
                    tile[i * kColumns + n] *= drop_.factor(static_cast<uint64_t>((row + i) * columns_ + column + n));
    }

  private:
    float* bias_panel(int64_t p) { return memory_ + p * (depth_ + 1) * kColumns; }

    const LowrankLinear& op_;
    const float* z_;
    int64_t columns_;
    const Operand* bias_;
    Part parts_[2];
    int64_t depth_;
    Dropout drop_;
    int64_t column_ = 0;
    float* memory_ = nullptr;
    int64_t packed_[8];
};

// z, and h, s, u where they are kept, for rows [from, to).
void make_z(const LowrankLinear& op, const LowrankLinearForward& io, int64_t from, int64_t to) {
    if (op.rank == 0) return;  // no additive half
    const int64_t hidden = op.w2 == nullptr ? 0 : op.first;
    float* buffer = rows_scratch.floats(kDotRows * (op.in + op.rank + op.first + op.outputs));
    float *own_h = buffer + kDotRows * op.in, *own_u = own_h + kDotRows * op.rank, *own_s = own_u + kDotRows * op.first;
    each_task(op, from, to, [&](int64_t task, int64_t begin, int64_t end) {
        const Adapter adapter(op, task);
        for (int64_t row = begin; row < end; row += kDotRows) {
            const int64_t rows = smaller(kDotRows, end - row);
            const FloatRows x = as_floats(input(op), row, rows, 0, op.in, buffer, dropout(op), op.in);
            float* h = io.h == nullptr ? own_h : io.h + row * op.rank;
            skinny(rows, op.rank, op.in, x.data, x.stride, adapter.V, op.in, h, op.rank);
            float* s = io.s == nullptr ? own_s : io.s + row * op.outputs;
            if (op.outputs != 0) {
                float* u = hidden != 0 && io.u != nullptr ? io.u + row * op.first : own_u;
                skinny(rows, op.first, op.in, x.data, x.stride, adapter.w1, op.in, u, op.first);
                for (int64_t i = 0; i < rows; ++i) {
                    if (adapter.b1 != nullptr)
                        for (int64_t j = 0; j < op.first; ++j) u[i * op.first + j] += adapter.b1[j];
                    generate(op, adapter, u + i * op.first, s + i * op.outputs);
                }
            }
            for (int64_t i = 0; i < rows; ++i)
                apply_middle(op, h + i * op.rank, s + i * op.outputs, io.z + (row + i) * op.rank);
        }
    });
}

// Where backward keeps what passes from its first phase to its second.
struct Workspace {
    float* z;       // [T, r], scaling included
    float* inner;   // [T, r + first]: dh and du side by side, what flows back into x
    float* dg;      // [T, S] of an MLP generator
    float* hidden;  // [T, m] activated hidden layer of an MLP generator
    float* U;       // [B, r, N]: U transposed, so that dz is a product of rows
    float* dU;      // [B, r, N]
    float* dP;      // [units, N, R]: what each unit of columns adds to the gradient of P, for one task
    float* dQ;      // [C, R, K / C]: what each block of columns adds to the gradient of Q, for one task

    Workspace(const LowrankLinear& op, float* memory) {
        const int64_t tasks = op.segments == nullptr ? 1 : op.tasks, mlp = op.w2 == nullptr ? 0 : op.rows;
        z = memory;
        inner = z + op.rows * op.rank;
        dg = inner + op.rows * (op.rank + op.first);
        hidden = dg + mlp * op.outputs;
        U = hidden + mlp * op.first;
        dU = U + tasks * op.rank * op.out;
        dP = dU + tasks * op.rank * op.out;
        dQ = op.factor.P == nullptr ? dP : dP + op.factor.units() * op.factor.out * op.factor.rank;
    }
};

// dz = scaling · dy U, then dh, du (and dg, hidden of an MLP) and z again, for rows [from, to).
void make_inner(const LowrankLinear& op, const LowrankLinearBackward& io, const Workspace& work, int64_t from,
                int64_t to) {
    if (op.rank == 0) return;
    const Operand dy = cotangent(op, io);
    const int64_t width = op.rank + op.first;
    float* buffer = rows_scratch.floats(kDotRows * (op.out + op.rank) + op.outputs);
    float *dz = buffer + kDotRows * op.out, *own_dg = dz + kDotRows * op.rank;
    each_task(op, from, to, [&](int64_t task, int64_t begin, int64_t end) {
        const Adapter adapter(op, task);
        for (int64_t row = begin; row < end; row += kDotRows) {
            const int64_t rows = smaller(kDotRows, end - row);
            const FloatRows left = as_floats(dy, row, rows, 0, op.out, buffer, Dropout{}, op.out);
            skinny(rows, op.rank, op.out, left.data, left.stride, work.U + task * op.rank * op.out, op.out, dz,
                   op.rank);
            for (int64_t t = row; t < row + rows; ++t) {
                const float *h = io.h + t * op.rank, *s = io.s + t * op.outputs;
                float *dh = work.inner + t * width, *du = dh + op.rank, *row_dz = dz + (t - row) * op.rank;
                float* dg = adapter.w2 != nullptr ? work.dg + t * op.outputs : own_dg;
                apply_middle(op, h, s, work.z + t * op.rank);
                for (int64_t i = 0; i < op.rank; ++i) row_dz[i] *= op.scaling;
                middle_backward(op, h, s, row_dz, dh, dg);
                if (adapter.w2 == nullptr) {
                    for (int64_t j = 0; j < op.first; ++j) du[j] = dg[j];
                    continue;
                }
                const float* u = io.u + t * op.first;
                for (int64_t j = 0; j < op.first; ++j) {
                    float sum = 0;
                    for (int64_t i = 0; i < op.outputs; ++i) sum += dg[i] * adapter.w2[i * op.first + j];
                    du[j] = sum * hidden_slope(op.hidden_activation, u[j]);
                    work.hidden[t * op.first + j] = activate(op.hidden_activation, u[j]);
                }
            }
        }
    });
}

// target [columns] = the sum over a task's rows of a [rows, columns].
void sum_rows(const float* a, int64_t a_row, int64_t begin, int64_t end, Range columns, float* target) {
    for (int64_t j = columns.begin; j < columns.end; ++j) target[j] = 0;
    for (int64_t t = begin; t < end; ++t)
        for (int64_t j = columns.begin; j < columns.end; ++j) target[j] += a[t * a_row + j];
}

// The adapter's gradients, each thread its columns of every one of them.
void adapter_gradients(const LowrankLinear& op, const LowrankLinearBackward& io, const Workspace& work, int thread,
                       int threads) {
    const Operand dy = cotangent(op, io), x = input(op);
    const int64_t tasks = op.segments == nullptr ? 1 : op.tasks, width = op.rank + op.first;
    const Range out = share(op.out, kColumns, thread, threads), in = share(op.in, kColumns, thread, threads);
    const Range first = share(op.first, kColumns, thread, threads),
                outputs = share(op.outputs, kColumns, thread, threads);
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t begin = op.segments == nullptr ? 0 : op.segments[task];
        const int64_t end = op.segments == nullptr ? op.rows : op.segments[task + 1], rows = end - begin;
        const float *z = work.z + begin * op.rank, *inner = work.inner + begin * width;
        if (io.dU != nullptr) {
            float* dU = work.dU + task * op.rank * op.out;
            tall(dy, begin, rows, out, z, op.rank, op.rank, dU, op.out, Dropout{}, op.out, panels);
            transpose(dU + out.begin, op.rank, out.end - out.begin, op.out,
                      io.dU + (task * op.out + out.begin) * op.rank, op.rank);
        }
        if (io.dV != nullptr)
            tall(x, begin, rows, in, inner, op.rank, width, io.dV + task * op.rank * op.in, op.in, dropout(op), op.in,
                 panels);
        if (io.dw1 != nullptr)
            tall(x, begin, rows, in, inner + op.rank, op.first, width, io.dw1 + task * op.first * op.in, op.in,
                 dropout(op), op.in, panels);
        if (io.db1 != nullptr) sum_rows(work.inner + op.rank, width, begin, end, first, io.db1 + task * op.first);
        if (io.dw2 != nullptr)
            tall({reinterpret_cast<const char*>(work.hidden), op.first, 1, false}, begin, rows, first,
                 work.dg + begin * op.outputs, op.outputs, op.outputs, io.dw2 + task * op.outputs * op.first, op.first,
                 Dropout{}, op.first, panels);
        if (io.db2 != nullptr) sum_rows(work.dg, op.outputs, begin, end, outputs, io.db2 + task * op.outputs);
    }
}

// The dense product, with W times each task's own factor where there is one.
void dense_of_tasks(const LowrankLinear& op, const Dense& product, bool outputs, Range mine, LowrankSeed& seed) {
    if (op.factor.P == nullptr) return dense(product, mine, seed, panels);
    each_task(op, 0, op.rows, [&](int64_t task, int64_t begin, int64_t end) {
        const Factor own = op.factor.of_task(task);
        Dense part = product;
        part.rows = end - begin;
        part.a.data += begin * part.a.row * part.a.element();
        part.c += begin * part.c_row * part.a.element();
        part.factor = &own;
        part.outputs = outputs;
        part.first_row = begin;
        dense(part, mine, seed, panels);
    });
}

// Gradients of P, Q and W, called by all threads: units of columns in parallel, then their sums in order.
void factor_gradients_of_tasks(const LowrankLinear& op, const LowrankLinearBackward& io, const Workspace& work,
                               int thread, int threads) {
    constexpr int64_t kChunk = 1024;  // rows whose panels stay in a few megabytes
    const Operand dy{io.dy, io.dy_row, 1, op.bf16}, weight{op.weight, op.weight_row, op.weight_column, op.bf16};
    const int64_t tasks = op.segments == nullptr ? 1 : op.tasks;
    const int64_t R = op.factor.rank, N = op.out, width = op.factor.width(), per_block = op.factor.units_of_block();
    for (int64_t task = 0; task < tasks; ++task) {
        const Factor factor = op.factor.of_task(task);
        const int64_t begin = op.segments == nullptr ? 0 : op.segments[task];
        const int64_t end = op.segments == nullptr ? op.rows : op.segments[task + 1];
        const Range units = share(factor.units(), 1, thread, threads);
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t from = unit % per_block * factor.unit(), to = smaller(from + factor.unit(), width);
            float *dP = nullptr, *dQ = nullptr;
            if (io.dP != nullptr || io.dQ != nullptr) {
                dP = work.dP + unit * N * R;
                dQ = work.dQ + unit / per_block * R * width;
                memset(dP, 0, static_cast<size_t>(N * R) * sizeof(float));
                for (int64_t i = 0; i < R; ++i)
                    memset(dQ + i * width + from, 0, static_cast<size_t>(to - from) * sizeof(float));
            }
            for (int64_t row = begin; row < end; row += kChunk)
                factor_gradients(factor, unit, input(op), dy, row, smaller(kChunk, end - row), weight, dP, dQ, io.dW,
                                 panels);
        }
#pragma omp barrier
        const Range outputs = share(N * R, 1, thread, threads), inputs = share(R * width, 1, thread, threads);
        if (io.dP != nullptr)
            for (int64_t block = 0; block < factor.blocks; ++block)
                for (int64_t i = outputs.begin; i < outputs.end; ++i) {
                    float sum = 0;
                    for (int64_t unit = 0; unit < per_block; ++unit)
                        sum += work.dP[(block * per_block + unit) * N * R + i];
                    io.dP[task * factor.P_size() + block * N * R + i] = sum;
                }
        if (io.dQ != nullptr)
            for (int64_t i = inputs.begin; i < inputs.end; ++i) {
                float sum = 0;
                for (int64_t block = 0; block < factor.blocks; ++block) sum += work.dQ[block * R * width + i];
                io.dQ[task * factor.Q_size() + i] = sum;
            }
#pragma omp barrier
    }
}

// A second thread costs a few microseconds; below this many multiplications it is not worth them.
int useful_threads(const LowrankLinear& op) {
    return op.rows * op.in * op.out < (1 << 17) ? 1 : op.threads;
}

}  // namespace

void lowrank_linear_forward(const LowrankLinear& op, const LowrankLinearForward& io) {
    const Operand bias{io.bias, 0, 1, op.bf16}, U{reinterpret_cast<const char*>(op.U), 1, op.rank, false};
    const Operand weight{op.weight, op.weight_column, op.weight_row, op.bf16};  // [K, N]
    const Dense product{op.rows, op.in, op.out, input(op), weight, io.y, op.out, op.y_index};
#pragma omp parallel num_threads(useful_threads(op))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Range rows = share(op.rows, kDotRows, thread, threads);
        make_z(op, io, rows.begin, rows.end);
#pragma omp barrier
        LowrankSeed seed(op, io.z, op.out, io.bias == nullptr ? nullptr : &bias, {U, op.rank, op.out * op.rank},
                         {U, 0, 0}, Dropout{});
        dense_of_tasks(op, product, true, share(op.out, kColumns, thread, threads), seed);
    }
}

void lowrank_linear_backward(const LowrankLinear& op, const LowrankLinearBackward& io) {
    const Workspace work(op, io.workspace);
    const int64_t tasks = op.segments == nullptr ? 1 : op.tasks;
    const Operand weight{op.weight, op.weight_row, op.weight_column, op.bf16};  // [N, K]
    const Operand V{reinterpret_cast<const char*>(op.V), op.in, 1, false};
    const Operand w1{reinterpret_cast<const char*>(op.w1), op.in, 1, false};
    const Dense product{op.rows, op.out, op.in, cotangent(op, io), weight, io.dx, op.in, op.x_index};
#pragma omp parallel num_threads(useful_threads(op))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Range columns = share(op.out, kColumns, thread, threads);
        for (int64_t task = 0; task < tasks; ++task)
            transpose(op.U + (task * op.out + columns.begin) * op.rank, columns.end - columns.begin, op.rank, op.rank,
                      work.U + task * op.rank * op.out + columns.begin, op.out);
#pragma omp barrier
        const Range rows = share(op.rows, kDotRows, thread, threads);
        make_inner(op, io, work, rows.begin, rows.end);
#pragma omp barrier
        adapter_gradients(op, io, work, thread, threads);
        if (io.dx != nullptr) {
            LowrankSeed seed(op, work.inner, op.in, nullptr, {V, op.rank, op.rank * op.in},
                             {w1, op.first, op.first * op.in}, dropout(op));
            dense_of_tasks(op, product, false, share(op.in, kColumns, thread, threads), seed);
        }
        if (io.dP != nullptr || io.dQ != nullptr || io.dW != nullptr)
            factor_gradients_of_tasks(op, io, work, thread, threads);
    }
}

}  // namespace TARP_ISA
}  // namespace tarp
