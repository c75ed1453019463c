// The Python module tarp_kernels._C.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/cpu_features.h"
#include "common/cuda/runtime.h"
#include "common/isa_probe.h"
#include "cuda_sources.h"
#include "lowrank_linear/gradients_cuda.h"
#include "lowrank_linear/lowrank_linear.h"
#include "lowrank_linear/lowrank_linear_cuda.h"
#include "lowrank_linear/skinny_cuda.h"
#include "masked_sublayer/masked_sublayer_cuda.h"
#include "search_cell/search_cell.h"
#include "search_cell/search_cell_cuda.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
    py::list usable;
    for (tarp::Isa isa : tarp::usable_isas()) usable.append(tarp::isa_name(isa));
    py::dict features;
    features["usable"] = usable;
    features["active"] = tarp::isa_name(tarp::active_isa());
    features["threads"] = omp_get_max_threads();
    return features;
}

py::dict describe(const tarp::IsaProbe& probe) {
    py::dict flags;
    flags["vector_bytes"] = probe.vector_bytes;
    flags["fma"] = probe.fma;
    flags["bf16_dot"] = probe.bf16_dot;
    return flags;
}

// False, or the architectures that there are CUDA kernels for.
py::object cuda_architectures() {
#ifdef TARP_CUDA
    return py::str(tarp::cuda::architectures()).attr("split")(", ");
#else
    return py::bool_(false);
#endif
}

// A digest of the sources of the CUDA kernels, empty without them: what was measured holds for these kernels alone.
const char* cuda_sources() {
#ifdef TARP_CUDA
    return TARP_CUDA_SOURCES;
#else
    return "";
#endif
}

py::dict build_info() {
    py::dict isas;
#define TARP_DESCRIBE(isa) isas[#isa] = describe(tarp::isa::compiled_with());
    TARP_BUILT_ISAS(TARP_DESCRIBE)
#undef TARP_DESCRIBE
    py::dict info;
    info["version"] = TARP_VERSION;
    info["compiler"] = __VERSION__;
    info["openmp"] = _OPENMP;
    info["sanitizers"] = TARP_SANITIZERS;
    info["cuda"] = cuda_architectures();
    info["cuda_sources"] = cuda_sources();
    info["isas"] = isas;
    return info;
}

// --- lowrank_linear: the arguments in the order of tarp_kernels/ops/lowrank_linear/native.py
// --------------------------------

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

tarp::Activation activation(const char* name) {
    using tarp::Activation;
    const std::pair<const char*, Activation> known[] = {
        {"none", Activation::none}, {"one_plus", Activation::one_plus}, {"sigmoid", Activation::sigmoid},
        {"tanh", Activation::tanh}, {"softplus", Activation::softplus}, {"relu", Activation::relu},
        {"gelu", Activation::gelu}, {"silu", Activation::silu}};
    for (const auto& entry : known)
        if (std::strcmp(entry.first, name) == 0) return entry.second;
    throw std::invalid_argument(std::string("activation: got '") + name + "', which the kernels do not know");
}

using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Adapter = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using FactorOf = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, const char*>;  // P, Q, rank, blocks, activation

tarp::FactorActivation factor_activation(const char* name) {
    using tarp::FactorActivation;
    const std::pair<const char*, FactorActivation> known[] = {{"centred_softplus", FactorActivation::centred_softplus},
                                                              {"one_plus", FactorActivation::one_plus},
                                                              {"softplus", FactorActivation::softplus}};
    for (const auto& entry : known)
        if (std::strcmp(entry.first, name) == 0) return entry.second;
    throw std::invalid_argument(std::string("multiplicative: got '") + name + "', which the kernels do not know");
}

tarp::LowrankLinear lowrank_linear(const Sizes& sizes, int64_t first, int64_t tasks, uintptr_t segments, bool bf16,
                                   uintptr_t x, int64_t x_row, uintptr_t weight, int64_t weight_row,
                                   int64_t weight_column, const Adapter& adapter, bool full,
                                   const char* hidden_activation, const char* output_activation, double scaling,
                                   uint64_t drop_threshold, uint64_t drop_seed, int threads, const FactorOf& factor,
                                   uintptr_t x_index, uintptr_t y_index) {
    tarp::LowrankLinear op{};
    std::tie(op.rows, op.in, op.out, op.rank) = sizes;
    op.first = first;
    op.outputs = first == 0 ? 0 : full ? op.rank * op.rank : op.rank;
    op.tasks = tasks;
    op.segments = pointer<const int64_t>(segments);
    op.bf16 = bf16;
    op.x = pointer<const char>(x);
    op.x_row = x_row;
    op.weight = pointer<const char>(weight);
    op.weight_row = weight_row;
    op.weight_column = weight_column;
    const auto [V, U, w1, b1, w2, b2] = adapter;
    op.V = pointer<const float>(V);
    op.U = pointer<const float>(U);
    op.w1 = pointer<const float>(w1);
    op.b1 = pointer<const float>(b1);
    op.w2 = pointer<const float>(w2);
    op.b2 = pointer<const float>(b2);
    op.full = full;
    op.hidden_activation = activation(hidden_activation);
    op.activation = activation(output_activation);
    op.scaling = static_cast<float>(scaling);
    op.drop_threshold = drop_threshold;
    op.drop_seed = drop_seed;
    op.threads = threads;
    const auto [P, Q, factor_rank, blocks, kind] = factor;
    op.factor = {pointer<const float>(P),
                 pointer<const float>(Q),
                 factor_rank,
                 blocks,
                 op.out,
                 op.in,
                 P == 0 ? tarp::FactorActivation::one_plus : factor_activation(kind)};
    op.x_index = pointer<const int64_t>(x_index);
    op.y_index = pointer<const int64_t>(y_index);
    return op;
}

template <class... Common>
void forward(Common... common, uintptr_t bias, uintptr_t y, uintptr_t h, uintptr_t s, uintptr_t u, uintptr_t z) {
    const tarp::LowrankLinear op = lowrank_linear(common...);
    const tarp::LowrankLinearForward io{pointer<const char>(bias), pointer<char>(y),  pointer<float>(h),
                                        pointer<float>(s),         pointer<float>(u), pointer<float>(z)};
    const py::gil_scoped_release release;
    tarp::lowrank_linear_forward(op, io);
}

template <class... Common>
void backward(Common... common, uintptr_t dy, int64_t dy_row, uintptr_t h, uintptr_t s, uintptr_t u, uintptr_t dx,
              uintptr_t dV, uintptr_t dU, uintptr_t dw1, uintptr_t db1, uintptr_t dw2, uintptr_t db2, uintptr_t dP,
              uintptr_t dQ, uintptr_t dW, uintptr_t workspace) {
    const tarp::LowrankLinear op = lowrank_linear(common...);
    const tarp::LowrankLinearBackward io{pointer<const char>(dy), dy_row,
                                         pointer<const float>(h), pointer<const float>(s),
                                         pointer<const float>(u), pointer<char>(dx),
                                         pointer<float>(dV),      pointer<float>(dU),
                                         pointer<float>(dw1),     pointer<float>(db1),
                                         pointer<float>(dw2),     pointer<float>(db2),
                                         pointer<float>(dP),      pointer<float>(dQ),
                                         pointer<float>(dW),      pointer<float>(workspace)};
    const py::gil_scoped_release release;
    tarp::lowrank_linear_backward(op, io);
}

template <class... Common>
int64_t workspace(Common... common) {
    return tarp::backward_workspace(lowrank_linear(common...));
}

// All take what `lowrank_linear` above takes, then their own pointers.
template <class... Common>
void define_lowrank_linear(py::module_& module, tarp::LowrankLinear (*)(Common...)) {
    module.def("lowrank_linear_forward", &forward<std::decay_t<Common>...>, "y, and h, s, u where they are asked for.");
    module.def("lowrank_linear_backward_workspace", &workspace<std::decay_t<Common>...>, "Floats that backward needs.");
    module.def("lowrank_linear_backward", &backward<std::decay_t<Common>...>,
               "The gradients whose pointers are not 0.");
}

#ifdef TARP_CUDA
// The arguments in the order of tarp_kernels/ops/lowrank_linear/cuda_kernels.py.
using FewRowsPointers = std::array<uintptr_t, 20>;
using FewRowsNumbers = std::array<int, 17>;

void few_rows(int device, uintptr_t stream, bool bf16, int token_tiles, int blocks, int shared_bytes,
              const FewRowsPointers& p, const FewRowsNumbers& n, float scaling) {
    const auto in = [&](size_t i) { return pointer<const void>(p[i]); };
    const auto numbers = [&](size_t i) { return pointer<const int64_t>(p[i]); };
    const auto out = [&](size_t i) { return pointer<float>(p[i]); };
    const tarp::cuda::FewRowsTensors tensors{in(0),
                                             in(1),
                                             in(2),
                                             in(3),
                                             in(4),
                                             in(5),
                                             in(6),
                                             in(7),
                                             in(8),
                                             numbers(9),
                                             numbers(10),
                                             numbers(11),
                                             pointer<const double>(p[12]),
                                             pointer<void>(p[13]),
                                             out(14),
                                             out(15),
                                             out(16),
                                             out(17),
                                             out(18),
                                             pointer<uint32_t>(p[19])};
    const tarp::cuda::FewRowsForm form{n[0], n[1],  n[2],  n[3],  n[4],  n[5],  n[6],  n[7],  n[8],
                                       n[9], n[10], n[11], n[12], n[13], n[14], n[15], n[16], scaling};
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_few_rows({device, pointer<void>(stream), bf16, token_tiles, blocks, shared_bytes},
                                        tensors, form);
}

using ManyRowsPointers = std::array<uintptr_t, 9>;
using ManyRowsNumbers = std::array<int, 9>;

tarp::cuda::ManyRowsTensors many_rows_tensors(const ManyRowsPointers& p) {
    const auto in = [&](size_t i) { return pointer<const void>(p[i]); };
    const auto numbers = [&](size_t i) { return pointer<const int64_t>(p[i]); };
    return {in(0), in(1), in(2), in(3), in(4), numbers(5), numbers(6), numbers(7), pointer<void>(p[8])};
}

tarp::cuda::ManyRowsForm many_rows_form(const ManyRowsNumbers& n) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
}

void many_rows(int device, uintptr_t stream, bool bf16, int tiles, const ManyRowsPointers& tensors,
               const ManyRowsNumbers& numbers) {
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_many_rows({device, pointer<void>(stream), bf16, tiles}, many_rows_tensors(tensors),
                                         many_rows_form(numbers));
}

void many_rows_sm90(int device, uintptr_t stream, bool bf16, int tiles, const ManyRowsPointers& tensors,
                    const ManyRowsNumbers& numbers, bool wide, uintptr_t maps) {
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_many_rows_sm90({device, pointer<void>(stream), bf16, tiles}, wide,
                                              many_rows_tensors(tensors), pointer<void>(maps), many_rows_form(numbers));
}

// The arguments in the order of tarp_kernels/ops/search_cell/cuda_kernels.py.
using CellLaunchNumbers = std::tuple<int, uintptr_t, bool, int, int>;  // device, stream, bf16, blocks, shared bytes
using CellNumbers = std::array<int, 8>;

tarp::cuda::CellLaunch cell_launch(const CellLaunchNumbers& numbers) {
    const auto& [device, stream, bf16, blocks, shared_bytes] = numbers;
    return {device, pointer<void>(stream), bf16, blocks, shared_bytes};
}

tarp::cuda::CellForm cell_form(const CellNumbers& n, float eps) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], eps};
}

template <int kCount, void (*kStart)(const tarp::cuda::CellLaunch&, const tarp::cuda::CellPointers<kCount>&,
                                     const tarp::cuda::CellForm&)>
void start_cell(const CellLaunchNumbers& launch, const tarp::cuda::CellPointers<kCount>& tensors,
                const CellNumbers& numbers, float eps) {
    const py::gil_scoped_release release;
    kStart(cell_launch(launch), tensors, cell_form(numbers, eps));
}

void cell_gradients(const CellLaunchNumbers& launch, const tarp::cuda::CellPointers<7>& tensors, int slots, int size,
                    const CellNumbers& numbers, float eps) {
    const py::gil_scoped_release release;
    tarp::cuda::search_cell_gradients(cell_launch(launch), tensors, slots, size, cell_form(numbers, eps));
}

void cell_add(const CellLaunchNumbers& launch, const tarp::cuda::CellPointers<11>& tensors, int slots, int tasks,
              int width, int size, bool wide) {
    const py::gil_scoped_release release;
    tarp::cuda::search_cell_add(cell_launch(launch), tensors, slots, tasks, width, size, wide);
}

// The arguments in the order of tarp_kernels/ops/lowrank_linear/cuda_skinny.py.
void skinny(int device, uintptr_t stream, bool bf16, int tiles, int columns, const std::array<uintptr_t, 15>& p,
            const std::array<int, 13>& n, float scaling) {
    const auto in = [&](size_t i) { return pointer<const void>(p[i]); };
    const auto numbers = [&](size_t i) { return pointer<const int64_t>(p[i]); };
    const auto out = [&](size_t i) { return pointer<float>(p[i]); };
    const tarp::cuda::SkinnyTensors tensors{in(0),
                                            in(1),
                                            in(2),
                                            in(3),
                                            in(4),
                                            in(5),
                                            numbers(6),
                                            numbers(7),
                                            pointer<const double>(p[8]),
                                            pointer<void>(p[9]),
                                            out(10),
                                            out(11),
                                            out(12),
                                            out(13),
                                            pointer<uint32_t>(p[14])};
    const tarp::cuda::SkinnyForm form{n[0], n[1], n[2], n[3],  n[4],  n[5],  n[6],
                                      n[7], n[8], n[9], n[10], n[11], n[12], scaling};
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_skinny(device, pointer<void>(stream), bf16, tiles, columns, tensors, form);
}

// The arguments of both in the order of tarp_kernels/ops/lowrank_linear/cuda_gradients.py.
void tall(int device, uintptr_t stream, bool bf16, int chunks, int narrow_columns, const std::array<uintptr_t, 6>& p,
          const std::array<int, 13>& n) {
    const auto numbers = [&](size_t i) { return pointer<const int64_t>(p[i]); };
    const tarp::cuda::TallTensors tensors{
        pointer<const void>(p[0]), pointer<const void>(p[1]), numbers(2), numbers(3), numbers(4), pointer<float>(p[5])};
    const tarp::cuda::TallForm form{
        {n[0], n[1], n[2], n[3], n[4]}, {n[5], n[6], n[7], n[8], n[9]}, n[10], n[11], n[12]};
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_tall(device, pointer<void>(stream), bf16, chunks, narrow_columns, tensors, form);
}

void add_parts(int device, uintptr_t stream, int kind, const std::array<uintptr_t, 3>& p, const std::array<int, 6>& n) {
    const tarp::cuda::PartsForm form{n[0], n[1], n[2], n[3], n[4], n[5]};
    const py::gil_scoped_release release;
    tarp::cuda::lowrank_linear_add_parts(device, pointer<void>(stream), static_cast<tarp::cuda::PartsOut>(kind),
                                         pointer<const float>(p[0]), pointer<const int64_t>(p[1]), pointer<void>(p[2]),
                                         form);
}

// --- rows of a masked sublayer: the arguments in the order of tarp_kernels/ops/row_copies.py

void gather_rows(int device, uintptr_t stream, int piece_bytes, const std::array<uintptr_t, 3>& p,
                 const std::array<int, 4>& n) {
    const py::gil_scoped_release release;
    tarp::cuda::gather_rows(device, pointer<void>(stream), piece_bytes, pointer<const void>(p[0]),
                            pointer<const int64_t>(p[1]), pointer<void>(p[2]), {n[0], n[1], n[2], n[3]});
}

void scatter_rows(int device, uintptr_t stream, int piece_bytes, const std::array<uintptr_t, 5>& p,
                  const std::array<int, 5>& n) {
    const py::gil_scoped_release release;
    tarp::cuda::scatter_rows(device, pointer<void>(stream), piece_bytes, pointer<const void>(p[0]),
                             pointer<const void>(p[1]), pointer<const int64_t>(p[2]), pointer<const uint8_t>(p[3]),
                             pointer<void>(p[4]), {n[0], n[1], n[2], n[3], n[4]});
}
#endif

// --- search_cell: the arguments in the order of tarp_kernels/ops/search_cell/native.py

using CellSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // T, d, C, sequences, tasks
using CellFlags = std::tuple<bool, bool, bool>;                             // causal, per_task, bf16
using CellPointers = std::array<uintptr_t, 12>;

tarp::SearchCell search_cell(const CellSizes& sizes, const CellFlags& flags, uintptr_t offsets,
                             uintptr_t task_sequences, uintptr_t x, uintptr_t h, const CellPointers& weights,
                             uintptr_t alpha, int threads) {
    tarp::SearchCell op{};
    std::tie(op.tokens, op.d, op.width, op.sequences, op.tasks) = sizes;
    std::tie(op.causal, op.per_task, op.bf16) = flags;
    op.offsets = pointer<const int64_t>(offsets);
    op.task_sequences = pointer<const int64_t>(task_sequences);
    op.x = pointer<const char>(x);
    op.h = pointer<const char>(h);
    const auto w = [&](size_t i) { return pointer<const float>(weights[i]); };
    op.weights = {w(0), w(1), w(2), w(3), w(4), w(5), w(6), w(7), w(8), w(9), w(10), w(11)};
    op.alpha = pointer<const float>(alpha);
    op.threads = threads;
    return op;
}

template <class... Common>
std::tuple<int64_t, int64_t> cell_sizes(Common... common) {
    const tarp::SearchCell op = search_cell(common...);
    return {op.array(), op.slots()};
}

template <class... Common>
int64_t cell_forward(Common... common, uintptr_t out, uintptr_t nodes, uintptr_t active, uintptr_t state,
                     uintptr_t state_after) {
    const tarp::SearchCell op = search_cell(common...);
    const tarp::SearchCellForward io{pointer<char>(out), pointer<float>(nodes), pointer<uint8_t>(active),
                                     pointer<const float>(state), pointer<float>(state_after)};
    const py::gil_scoped_release release;
    return tarp::search_cell_forward(op, io);
}

template <class... Common>
int64_t cell_backward(Common... common, uintptr_t dout, uintptr_t nodes, uintptr_t active, uintptr_t dx, bool residual,
                      uintptr_t dalpha, const CellPointers& gradients) {
    const tarp::SearchCell op = search_cell(common...);
    const auto g = [&](size_t i) { return pointer<float>(gradients[i]); };
    const tarp::SearchCellBackward io{pointer<const char>(dout),
                                      pointer<const float>(nodes),
                                      pointer<const uint8_t>(active),
                                      pointer<char>(dx),
                                      residual,
                                      pointer<float>(dalpha),
                                      {g(0), g(1), g(2), g(3), g(4), g(5), g(6), g(7), g(8), g(9), g(10), g(11)}};
    const py::gil_scoped_release release;
    return tarp::search_cell_backward(op, io);
}

// All take what `search_cell` above takes, then their own pointers.
template <class... Common>
void define_search_cell(py::module_& module, tarp::SearchCell (*)(Common...)) {
    module.def("search_cell_sizes", &cell_sizes<std::decay_t<Common>...>, "Floats of an inner array, maps selected.");
    module.def("search_cell_forward", &cell_forward<std::decay_t<Common>...>,
               "out and what backward needs; returns the C x C products that ran, counted by token.");
    module.def("search_cell_backward", &cell_backward<std::decay_t<Common>...>,
               "The gradients whose pointers are not 0; returns the C x C products of its first half.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("cpu_features", &cpu_features,
               "Instruction sets that run here, the one in use, and the number of OpenMP threads.");
    module.def("set_isa", &tarp::set_active_isa, py::arg("name"),
               "Use the kernels of one instruction set from now on.");
    define_lowrank_linear(module, &lowrank_linear);
    define_search_cell(module, &search_cell);
#ifdef TARP_CUDA
    module.def("lowrank_linear_many_rows", &many_rows, "y on a GPU, z made before.");
    module.def("lowrank_linear_many_rows_sm90", &many_rows_sm90, "The same on a GPU of compute capability 9.0.");
    module.def("lowrank_linear_few_rows", &few_rows, "y, and h, s, u where they are asked for, on a GPU.");
    module.def("search_cell_cuda_forward", &start_cell<20, &tarp::cuda::search_cell_forward>, "out on a GPU.");
    module.def("search_cell_cuda_backward", &start_cell<26, &tarp::cuda::search_cell_backward>,
               "On a GPU the gradients of h and alpha, and what those of weights are sums of.");
    module.def("search_cell_cuda_gradients", &cell_gradients, "The sums of every chunk of rows, on a GPU.");
    module.def("search_cell_cuda_add", &cell_add, "The chunks' sums added up, on a GPU.");
    module.def("lowrank_linear_skinny", &skinny, "z, and h, s, u where they are asked for, for many rows on a GPU.");
    module.def("lowrank_linear_tall", &tall, "Sums over chunks of rows on a GPU.");
    module.def("lowrank_linear_add_parts", &add_parts, "Sums over each task's chunks on a GPU.");
    module.def("gather_rows", &gather_rows, "Some rows of a matrix on a GPU.");
    module.def("scatter_rows", &scatter_rows, "A matrix with some rows replaced on a GPU.");
    module.def("cuda_versions", &tarp::cuda::versions, "Of the CUDA runtime built in, and the newest of the driver.");
#endif
    module.def("build_info", &build_info, "How this extension was compiled.");
}
