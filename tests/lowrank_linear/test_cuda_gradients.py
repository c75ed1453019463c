"""The CUDA kernels that make an adapter's gradients without a GPU: values, memory accesses and seeded mistakes."""

import itertools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear import cuda_gradients, cuda_plans
from tarp_kernels.ops.lowrank_linear.layout import Selection
from tarp_kernels.ops.lowrank_linear.triton_products import Rows
from tests.lowrank_linear.cases import Case, build, cotangent, lay_out, run_with_gradients
from tests.lowrank_linear.cuda_product_runs import ProductLaunch, products_on_ptx_machine
from tests.lowrank_linear.cuda_runs import needs_nvcc, on_ptx_machine
from tests.lowrank_linear.oracle import TensorCoreOracle, bounds, excess
from tests.lowrank_linear.selected import MODES, check, select
from tests.lowrank_linear.triton_runs import on_ptx_machine as triton_on_ptx_machine
from tests.ptx_machine import launch as machine

pytestmark = needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sum:
    """One call of `tall`: aᵀ b for each task, b of no columns a column of ones."""

    lengths: tuple[int, ...] | int  # rows, of each task
    p: int
    q: int
    dtype: torch.dtype = BF16
    out: torch.dtype = torch.float32
    layout: str = "contiguous"
    index: bool = False
    chunk: int = 64

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """a, b and the rows of theirs that the call's rows are."""
        draw = torch.Generator().manual_seed(3)
        count = self.lengths if isinstance(self.lengths, int) else sum(self.lengths)
        total = count + 9 if self.index else count

        def normal(columns: int) -> Tensor:
            return lay_out(torch.randn(total, columns, generator=draw).to(self.dtype), self.layout)

        rows = torch.randperm(total, generator=draw)[:count].sort().values if self.index else None
        return normal(self.p), normal(self.q) if self.q else None, rows

    @property
    def segments(self) -> Tensor | None:
        if isinstance(self.lengths, int):
            return None
        return torch.tensor(list(itertools.accumulate(self.lengths, initial=0)), dtype=torch.int32)

    def run(self, mistake: Any = None, cc: int = 80) -> tuple[dict[str, Tensor], list[ProductLaunch]]:
        """The first and the other rows of a's columns apart, as V and w1 are."""
        a, b, index = self.operands()
        names = {"first": self.p - self.p // 3, "second": self.p // 3}
        lead = () if isinstance(self.lengths, int) else (len(self.lengths),)
        out = {
            name: torch.full((*lead, count, max(1, self.q)), float("nan"), dtype=self.out)
            for name, count in names.items()
        }
        rows = Rows(a, self.segments, selection=None if index is None else Selection(index, None))
        with products_on_ptx_machine(cc, mistake, chunk=self.chunk) as launches:
            cuda_gradients.tall(rows, a, b, names, out, a_rows=index, b_rows=index)
        return out, launches

    def excess(self, found: dict[str, Tensor]) -> float:
        """The largest error over what float32 sums of exact products, rounded once, may be off by."""
        a, b, index = self.operands()
        b = torch.ones(len(a), 1, dtype=a.dtype) if b is None else b
        a, b = (t.double() if index is None else t.double()[index] for t in (a, b))
        bounds = [0, len(a)] if self.segments is None else self.segments.tolist()
        worst = 0.0
        value = torch.cat([t.double() for t in found.values()], dim=-2).reshape(-1, self.p, b.shape[1])
        for task, (start, end) in enumerate(itertools.pairwise(bounds)):
            wanted = a[start:end].T @ b[start:end]
            size = a[start:end].abs().T @ b[start:end].abs()
            allowed = (end - start + 2) * 2.0**-23 * size + torch.finfo(self.out).eps * wanted.abs() + 1e-9
            error = ((value[task] - wanted).abs() / allowed).nan_to_num(nan=float("inf"))
            worst = max(worst, float(error.max()))
        return worst


BASE = Sum(130, 136, 8)
# every count of columns, which operand is the wider one, pieces and single numbers, chunks of stages that are not full
CASES = [
    (BASE, 80),
    (replace(BASE, p=8, q=136, dtype=FP16, chunk=128), 80),
    (Sum((0, 1, 140, 0, 63), 5, 72), 80),
    (Sum((70, 0, 71), 24, 200, out=BF16, chunk=40), 90),
    (Sum(100, 72, 33, dtype=FP16, out=FP16, index=True), 100),
    (Sum((65, 3), 128, 112, chunk=1024), 80),
    (Sum(70, 60, 200, layout="padded"), 80),  # a wide operand of single numbers
    (Sum((30, 100), 40, 0), 80),
    (Sum(70, 7, 7, out=BF16), 80),
    (Sum(66, 144, 136), 80),  # narrow columns of two blocks
]


@pytest.mark.parametrize(("case", "cc"), CASES, ids=str)
def test_values_without_a_fault(case, cc):
    with mock.patch.object(cuda_plans, "sums", lambda *_: True):
        found, launches = case.run(cc=cc)
    assert case.excess(found) <= 1
    assert [launch.name for launch in launches] == ["tall", "add_parts", "add_parts"]
    report = launches[0].report
    assert report.mma > 0 and report.shared_wavefronts <= 1.1 * report.shared_ideal_wavefronts, report.worst_sites()


def test_a_gradient_has_the_same_bits_beside_other_tasks_and_on_every_call():
    alone, _ = Sum((200,), 40, 8).run()
    again, _ = Sum((200,), 40, 8).run()
    beside, _ = Sum((200, 31), 40, 8).run()
    for name, value in alone.items():
        assert torch.equal(value, again[name])
    a, b, _ = Sum((200, 31), 40, 8).operands()
    with mock.patch.object(Sum, "operands", lambda self: (a[:200], b[:200], None)):
        first, _ = Sum((200,), 40, 8).run()
    for name, value in first.items():
        assert torch.equal(value[0], beside[name][0])


FORMS = [
    Case(dtype=BF16, shape=(70, 264, 136), rank=8, b1=True, scaling=-6.0),
    Case(dtype=FP16, shape=(0, 264, 72), rank=5, segments=(30, 0, 100), generator="mlp", b1=True, b2=True, hidden=7),
    Case(dtype=BF16, shape=(5, 40, 24), rank=3, sigma="full", adapter_dtype=torch.float32, seed=1),
    Case(dtype=BF16, shape=(66, 40, 50), rank=3, x_layout="padded"),  # single numbers, of 64 columns at most,
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_gradients_of_a_call_and_none_of_their_sums_by_triton(case):
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(), triton_on_ptx_machine(80) as of_triton, products_on_ptx_machine() as ours:
        found = run_with_gradients(call, dy, "cuda")
    assert {name for name, value in found.items() if not excess(value, wanted[name]) <= 1} == set()
    of_z = {"forward_kernel"} if case.x_layout == "padded" else set()  # of too little depth
    assert {name for name, _ in of_triton} == {"middle_backward_kernel", "dense_kernel"} | of_z
    assert sum(launch.name == "tall" for launch in ours) == 2 + case.b1 + (case.generator == "mlp") + case.b2


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_found_through_an_index(mode):
    case = Case(dtype=BF16, segments=(0, 100, 60), shape=(0, 40, 24), rank=5, b1=True)
    selected = select(case, "runs", mode)
    with on_ptx_machine(), products_on_ptx_machine() as launches:
        check(selected, selected.run("cuda"), TensorCoreOracle)
    of_index = [launch.tensors.wide_index is not None for launch in launches if launch.name == "tall"]
    assert of_index == [mode != "read", mode != "write", False]


def test_single_numbers_of_many_columns_are_left_to_triton():
    case = Case(dtype=BF16, shape=(66, 256, 130), rank=3, generator="none")
    call, dy = build(case), cotangent(case)
    wanted = bounds(call, dy, TensorCoreOracle)
    with on_ptx_machine(), triton_on_ptx_machine(80) as of_triton, products_on_ptx_machine() as ours:
        found = run_with_gradients(call, dy, "cuda", ("V", "U"))
    assert all(excess(value, wanted[name]) <= 1 for name, value in found.items())
    assert "tall_kernel" in {name for name, _ in of_triton}
    assert [launch.name for launch in ours] == ["skinny", "tall", "add_parts"]


# --- memory accesses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Sum(256, 512, 8, chunk=128), Sum(256, 16, 256, FP16, chunk=128)], ids=str)
def test_the_wide_operand_is_read_once_and_parts_are_written_and_read_once(case):
    _, launches = case.run()
    (first, *second), (narrow, wide) = launches, sorted((case.p, case.q))
    operands, part = 256 * wide * 2 + wide // 64 * 256 * narrow * 2, narrow * wide * 4  # bytes
    assert operands <= 32 * first.report.global_load_sectors <= 1.05 * operands
    assert 32 * first.report.global_store_sectors == 2 * part
    assert 32 * sum(launch.report.global_load_sectors for launch in second) <= 1.05 * 2 * part
    assert 32 * sum(launch.report.global_store_sectors for launch in second) <= 1.05 * part


# --- seeded mistakes -------------------------------------------------------------------------------------------------

SEEN_BY = Sum((330, 0, 71), 136, 24, chunk=300)
OF_NUMBERS = Sum((70, 71), 61, 5)
PIECES = "row0 + row < end && column < operand.columns;\n            copy"
NUMBERS = "row0 + row < end && column < operand.columns;\n        tile"
MISTAKES = {
    "a stage is overwritten while it is read": ("tall", "__syncthreads();  // this stage is there, and", "//"),
    "a copy is not waited for": ("tall", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    "one stage too few": ("tall", "kRows - 1) / kRows;\n    float", "kRows - 1) / kRows - 1;\n    float"),
    "rows of the next chunk": ("tall", "min(own.end, begin + height)", "own.end"),
    "rows of the next task": ("tall", "min(own.end, begin + height)", "begin + height"),
    "one row too many": ("tall", PIECES, PIECES.replace("row < end", "row <= end")),
    "one column too many": ("tall", PIECES, PIECES.replace("column <", "column <=")),
    "the same rows twice": ("tall", "row0 + lane / 16 * 8 + lane % 8", "row0 + lane % 8"),
    "narrow rows in another order": ("tall", "(row0 + lane % 16, n * 2", "(row0 + (lane + 8) % 16, n * 2"),
    "the same eight columns twice": ("tall", "sum[2 * n + 1], a, b[2], b[3]", "sum[2 * n + 1], a, b[0], b[1]"),
    "columns of another warp": ("tall", "warp * 2 + lane / 8 % 2", "(warp + 1) % 4 * 2 + lane / 8 % 2"),
    "a part in the place of another": ("tall", "(chunk) * form.wide", "(chunk ^ 1) * form.wide"),
    "the first part alone": ("add_parts", "number < count;", "number < 1;"),
    "one part too few": ("add_parts", "form.chunk - 1) / form.chunk", "form.chunk - 1) / form.chunk - 1"),
    "the first name's sums": ("add_parts", "form.size + form.first + i", "form.size + i"),
    "the first task's gradient": ("add_parts", "out[static_cast<int64_t>(task)", "out[static_cast<int64_t>(0)"),
    "one sum too many": ("add_parts", "if (i >= form.count) return;", "if (i > form.count) return;"),
}  # fmt: skip
OF_SINGLE_NUMBERS = {
    "one row too many": ("tall", NUMBERS, NUMBERS.replace("row < end", "row <= end")),
    "one column too many": ("tall", NUMBERS, NUMBERS.replace("column <", "column <=")),
    "in pairs without being even": ("tall", " && form.narrow.columns % 2 == 0", ""),
    "one narrow column too many": ("tall", "if (of_narrow + 1 < form.narrow", "if (of_narrow < form.narrow"),
}  # fmt: skip


def is_seen(case: Sum, mistake: Any) -> bool:
    for together in (1024, 128):  # threads that run side by side: eight blocks, or one after the other
        try:
            with mock.patch.object(machine, "_LANES_TOGETHER", together):
                found, _ = case.run(mistake)
        except AssertionError:  # a fault
            return True
        if not case.excess(found) <= 1:
            return True
    return False


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    assert is_seen(SEEN_BY, MISTAKES[name])


@pytest.mark.parametrize("name", OF_SINGLE_NUMBERS)
def test_a_mistake_with_single_numbers_is_seen(name):
    assert is_seen(OF_NUMBERS, OF_SINGLE_NUMBERS[name])


@pytest.mark.parametrize("case", [SEEN_BY, OF_NUMBERS], ids=str)
def test_without_a_mistake_there_is_nothing_to_see(case):
    assert not is_seen(case, None)


def test_pieces_that_are_not_exchanged_cost_wavefronts():
    _, launches = BASE.run(("tall", "(piece ^ (row", "(piece ^ (0 * row"))
    report = launches[0].report
    assert report.shared_wavefronts > 1.1 * report.shared_ideal_wavefronts
