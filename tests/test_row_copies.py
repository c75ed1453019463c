"""`gather_rows` and `scatter_rows` on CUDA kernels without a GPU: values, derivatives, accesses and seeded mistakes."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tarp_kernels import backends, masked_sublayer
from tarp_kernels.ops import row_copies
from tarp_kernels.ops.row_copies import Picked, gather_rows, scatter_rows
from tests.lowrank_linear.cuda_product_runs import Mistake, kernel
from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.ptx_machine import Report
from tests.ptx_machine.launch import run

pytestmark = needs_nvcc

PIECES = {16: "uint4", 4: "uint32_t", 2: "uint16_t"}


@contextlib.contextmanager
def on_ptx_machine(mistake: Mistake | None = None) -> Iterator[list[tuple[str, int, Report]]]:
    """Within the block rows of CPU tensors are copied by the CUDA kernels; yields name, bytes of a piece, report."""
    launches: list[tuple[str, int, Report]] = []

    def launch(name: str, piece_bytes: int, tensors: tuple[Any, ...], numbers: tuple[int, ...]) -> None:
        count, total = numbers[:2]
        blocks = -(-count // 8) + (-(-total // 8) if name == "scatter_rows" else 0)
        tensors[-1].fill_(float("nan"))
        program = kernel("masked_sublayer/masked_sublayer", name, (PIECES[piece_bytes],), "sm_80", mistake)
        report = run(program, (blocks,), 256, [*tensors, struct.pack(f"{len(numbers)}i", *numbers)])
        report.raise_on_faults()
        launches.append((name, piece_bytes, report))

    with mock.patch.object(row_copies, "_served", lambda x: True), mock.patch.object(row_copies, "launch", launch):
        yield launches


def case(T: int, d: int, dtype: torch.dtype, pattern: str, layout: str = "contiguous") -> tuple[Tensor, Picked, Tensor]:
    """x [T, d], some rows, values for them."""
    draw = torch.Generator().manual_seed(1)
    masks = {
        "some": torch.rand(T, generator=draw) < 0.4,
        "runs": torch.arange(T) // 5 % 2 == 0,
        "one": torch.arange(T) == T - 1,
        "all": torch.ones(T, dtype=torch.bool),
    }
    mask = masks[pattern]
    index = mask.nonzero().squeeze(1)
    x = torch.randn(T, d, generator=draw).to(dtype)
    if layout == "padded":
        x = torch.full((T + 1, d + 3), float("nan"), dtype=dtype)[1:, 2 : 2 + d].copy_(x)
    elif layout == "wide":  # of rows that start at multiples of 16 bytes
        x = torch.full((T, d + 8), float("nan"), dtype=dtype)[:, 8:].copy_(x)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    return x, Picked(index, mask), torch.randn(len(index), d, generator=draw).to(dtype)


CASES = [
    (21, 64, torch.bfloat16, "some", "contiguous", 16),
    (9, 200, torch.float32, "runs", "wide", 16),
    (17, 7, torch.float16, "runs", "contiguous", 2),
    (8, 24, torch.float32, "all", "padded", 4),
    (30, 33, torch.bfloat16, "one", "transposed", 2),
    (12, 1100, torch.bfloat16, "some", "padded", 2),  # rows longer than what is under way at a time
]


@pytest.mark.parametrize(("T", "d", "dtype", "pattern", "layout", "piece"), CASES)
def test_bits_without_a_fault(T, d, dtype, pattern, layout, piece):
    x, picked, values = case(T, d, dtype, pattern, layout)
    with on_ptx_machine() as launches:
        gathered, scattered = gather_rows(x, picked), scatter_rows(x, picked, values)
    assert torch.equal(gathered, x[picked.numbers])
    assert torch.equal(scattered, x.index_copy(0, picked.numbers, values))
    assert [(name, size) for name, size, _ in launches] == [("gather_rows", piece), ("scatter_rows", piece)]


def test_a_row_number_that_is_none_leads_to_some_row():
    """On a GPU nobody looks at them before: they must lead nowhere else."""
    x, picked, values = case(16, 24, torch.bfloat16, "runs")
    index = picked.numbers.clone()
    index[0], index[-1] = -(2**40), 2**40
    wrong = picked._replace(numbers=index)
    with on_ptx_machine():
        assert torch.equal(gather_rows(x, wrong), x[index.clamp(0, 15)])
        scatter_rows(x, wrong, values)


def twice(function, inputs: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    total = sum(g.sin().sum() for g in first)
    return [*first, *torch.autograd.grad(total, inputs)]


def test_derivatives_of_first_and_second_order():
    x, picked, values = case(13, 8, torch.float32, "some")
    weight = torch.linspace(0.5, 2, 8)
    functions = {
        "gather": (lambda x: gather_rows(x * weight, picked).sin(), [x]),
        "scatter": (lambda x, v: scatter_rows(x * weight, picked, v.sin() * weight), [x, values]),
    }
    for function, inputs in functions.values():
        leaves = [t.clone().requires_grad_() for t in inputs]
        with on_ptx_machine() as launches:
            found = twice(function, leaves)
        assert len(launches) >= 4
        wanted = twice(function, leaves)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b) and b.any()


def test_gradients_of_what_is_asked_for_alone():
    x, picked, values = case(13, 8, torch.float32, "some")
    for asked in (0, 1):
        inputs = [x.clone(), values.clone()]
        inputs[asked].requires_grad_()
        with on_ptx_machine() as launches:
            scatter_rows(inputs[0], picked, inputs[1]).sum().backward()
        assert len(launches) == 2
        assert torch.equal(inputs[0].grad[:, 0], (~picked.mask).float()) if asked == 0 else inputs[1].grad.eq(1).all()


@pytest.mark.parametrize("pattern", ["some", "one"])
def test_a_masked_sublayer_gathers_and_puts_back_by_these(pattern):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).bfloat16()
    x, picked, _ = case(13, 8, torch.bfloat16, pattern)
    results = []
    for manager in (on_ptx_machine(), contextlib.nullcontext([])):
        leaf = x.clone().requires_grad_()
        with manager as launches:
            out = masked_sublayer(module, leaf, picked.mask)
            gradients = torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
        results.append([out, *gradients])
        names = [name for name, *_ in launches]
        assert names in ([], ["gather_rows", "scatter_rows", "scatter_rows", "gather_rows", "scatter_rows"])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_pytorch_copies_elsewhere():
    x, picked, values = case(13, 8, torch.float32, "some")
    with mock.patch.object(row_copies, "launch", side_effect=AssertionError):
        assert torch.equal(gather_rows(x, picked), x[picked.mask])
        assert torch.equal(scatter_rows(x, picked, values), x.index_copy(0, picked.numbers, values))


def test_the_kernels_serve_what_lies_on_a_gpu_that_has_them():
    there = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": (3, 8)}
    changes = [{"device": torch.device("cpu")}, {"dtype": torch.float64}, {"dtype": torch.int64}, {"shape": (3, 0)}]
    with mock.patch.object(row_copies, "needs_dispatcher", lambda x: False):
        with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS)):
            assert row_copies._served(mock.Mock(**there))
            assert not any(row_copies._served(mock.Mock(**there | change)) for change in changes)
        with mock.patch.object(backends, "_WHY_UNAVAILABLE", dict.fromkeys(backends.BACKENDS, "none here")):
            assert not row_copies._served(mock.Mock(**there))


# --- memory accesses -------------------------------------------------------------------------------------------------


def test_each_row_is_read_and_written_once():
    x, picked, values = case(64, 512, torch.bfloat16, "some")
    with on_ptx_machine() as launches:
        gather_rows(x, picked), scatter_rows(x, picked, values)
    count, row = len(picked.numbers), 512 * 2 // 32  # sectors of a row
    (_, _, gather), (_, _, scatter) = launches
    index, mask = -(-count // 8) * 2, 64 // 8  # two sectors for each eight numbers, one for each block's bools
    assert gather.global_store_sectors == count * row and gather.global_load_sectors <= count * row + index
    assert scatter.global_store_sectors == 64 * row and scatter.global_load_sectors <= 64 * row + index + mask


# --- seeded mistakes -------------------------------------------------------------------------------------------------

MISTAKES = {
    "gather: places are read before they are there": (
        "gather_rows",
        "form.total);\n    __syncthreads();  // the places are there\n    if",
        "form.total);\n    if",
    ),
    "scatter: places are read before they are there": (
        "scatter_rows",
        "__syncthreads();  // the places are there\n    const int own",
        "const int own",
    ),
    "gather: one row too many": ("gather_rows", "if (row < form.count)", "if (row <= form.count)"),
    "gather: one place too many": ("gather_rows", "threadIdx.x < form.count)", "threadIdx.x <= form.count)"),
    "gather: a row number that is none": ("gather_rows", "row < count ? row : count - 1", "row"),
    "gather: stride of the result": ("gather_rows", "(places[own]) * form.x_row", "(places[own]) * form.pieces"),
    "scatter: one row too many": (
        "scatter_rows",
        "places[threadIdx.x] = row >= end",
        "places[threadIdx.x] = row > end",
    ),
    "scatter: selected rows too": ("scatter_rows", "mask[row] != 0 ? -1 : row", "row"),
    "scatter: stride of the other": ("scatter_rows", "puts ? form.values_row : form.base_row", "form.values_row"),
    "a piece beyond the row": ("scatter_rows", "if (begin + 32 * i < pieces) to", "if (begin + 32 * i <= pieces) to"),
    "one piece of four": ("scatter_rows", "begin += 32 * kAhead", "begin += 64 * kAhead"),
}


def is_seen(mistake: Mistake | None) -> bool:
    x, picked, values = case(21, 1000, torch.float32, "some", "wide")
    index = picked.numbers.clone()
    index[-1] = 2**40  # the last row, which is selected
    try:
        with on_ptx_machine(mistake):
            gathered = gather_rows(x, picked._replace(numbers=index))
            scattered = scatter_rows(x, picked, values)
    except AssertionError:  # a fault
        return True
    right = x.index_copy(0, picked.numbers, values)
    return not (torch.equal(gathered, x[index.clamp(max=20)]) and torch.equal(scattered, right))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_source_is_seen(name):
    assert is_seen(MISTAKES[name])


def test_without_a_mistake_there_is_nothing_to_see():
    assert not is_seen(None)
