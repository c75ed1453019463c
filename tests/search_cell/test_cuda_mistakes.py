"""Mistakes in the source of the CUDA kernels of `search_cell`, each of which a run on the PTX machine must see."""

import re
from unittest import mock

import pytest
import torch

from tests.lowrank_linear.cuda_runs import needs_nvcc
from tests.ptx_machine import launch as machine
from tests.search_cell.cases import Case, build
from tests.search_cell.cuda_runs import cells_on_ptx_machine
from tests.search_cell.test_cuda import LARGE, wrong

pytestmark = needs_nvcc

FP16 = torch.float16

SEEN_BY = [
    Case(d=8, width=10, batch=(2, 20), tasks=(20, 20), dtype=FP16, alpha="from nothing"),
    Case(d=72, width=33, batch=None, lengths=(1, 70, 30), tasks=(71, 30), dtype=FP16, scale=0.7, norm=True),
    Case(d=72, width=40, batch=(1, 101), dtype=FP16, scale=0.7, causal=False, alpha="mixed"),
]
COMMON = {
    "a tile is read before it is there": ("__syncthreads();  // this step's is there, and", "//"),
    "a copy is not waited for": ("wait_for_copies_but(stages - 2)", "wait_for_copies_but(stages - 1)"),
    "the projections' tiles are overwritten": ("__syncthreads();  // the projections have been multiplied", ""),
    "a node is read before it is there": ("__syncthreads();  // the node is there", ""),
    "alpha is read before it is there": ("__syncthreads();  // alpha is there", ""),
    "rows leave before they are there": ("__syncthreads();  // the sums are there", ""),
    "not all rows are normed": ("__syncthreads();  // all rows are normed", ""),
    "a tap sees the sequence before": ("there ? -min(positions[token], left_row(m)) : 0", "there ? -left_row(m) : 0"),
    "a tap sees the sequence behind": ("min(lengths[token] - positions[token], kRows - left_row(m))",
                                       "kRows - left_row(m)"),
    "a tap sees one row too many": ("shift >= from[m] && shift < to[m]", "shift >= from[m] - 1 && shift < to[m]"),
    "one row of a weight too many": ("fetch(ring + stage * kTile, matrix, edges.width, 0, edges.width,",
                                     "fetch(ring + stage * kTile, matrix, edges.width, 0, edges.width + 1,"),
    "one column of a weight too many": ("0, edges.width, edges.width, matrix);",
                                        "0, edges.width, edges.width + 1, matrix);"),
    "the next task's rows leave too": ("token >= window.end) continue", "token > window.end) continue"),
    "the variance about zero": ("(v - m) * (v - m)", "v * v"),
    "the first task's maps": ("const int64_t edge = first + step.edge", "const int64_t edge = step.edge"),
    "the first task's biases": ("const int64_t at = first + edge;", "const int64_t at = edge;"),
    "the first task's alpha": ("alpha[window.task * form.alpha_task + threadIdx.x]", "alpha[threadIdx.x]"),
    "the last tap is forgotten": ("tap < taps_of(map); ++tap) *next++",
                                  "tap < taps_of(map) - (map > 2); ++tap) *next++"),
}  # fmt: skip
FORWARD = {
    "the mean over nodes that are read": ("__syncthreads();  // the nodes have been multiplied", ""),
    "n1 is left out of the mean": ("add(total, 1, tiles + 3 * kTile);", ""),
    "the first task's output": ("const int64_t size = static_cast<int64_t>(task) * form.d;", "const int64_t size = 0;"),
}
BACKWARD = {
    "dout's tiles are overwritten": ("__syncthreads();  // dout has been multiplied", ""),
    "nodes leave before they are there": ("__syncthreads();  // the nodes are there", ""),
    "what flows back is read before it is there": ("__syncthreads();  // what flows back is there", ""),
    "the mean leaves before it is there": ("__syncthreads();  // the mean is there", ""),
    "the last product is not made yet": ("__syncthreads();  // the last product is made", ""),
    "projections before their gradients": ("__syncthreads();  // what flows back into both", "//"),
    "taps look the same way back": ("-step.shift(form.causal)", "step.shift(form.causal)"),
    "alpha's sums of the whole window": ("if (row >= from && row < to) total +=", "total +="),
    "one row too many is stored": ("row < window.end - window.first && column",
                                   "row <= window.end - window.first && column"),
    "relu lets all through": ("own = own > 0 ? a * of_node : 0", "own = a * of_node"),
    "the projections' relu lets all through": ("own = input > 0 ? own : 0", "own = own"),
    "the gate's slope": ("own *= 1 - gate;", "own *= 1;"),
    "n0 forgets what n2 gave": ("else if (edge >= 2)\n            (source == 2",
                                "else if (edge >= 2 && edge != 7)\n            (source == 2"),
    "n1's gradient goes to n0": ("if (edge == 5 || edge == 2) d = later;", "if (edge == 5) d = later;"),
    "selected by another task: not zeroed": ("== 0)\n                for (int j", "== 7)\n                for (int j"),
    "an unselected operation flows back": ("if (map == 1 || !alive) continue;", "if (map == 1) continue;"),
}  # fmt: skip
GRADIENTS = {
    "the slot is read before it is found": ("__syncthreads();  // the slot's edge and map are found\n    const int e",
                                            "const int e"),
    "one row of the chunk too many": ("rows.end - first, form.width, flow", "rows.end - first + 1, form.width, flow"),
    "rows above are not fetched": ("max(0, -above)", "kReach"),
    "sequences flow together": ("make_int2(-position, token", "make_int2(-kReach, token"),
    "taps in the other order": ("form.causal ? tap + 1 - kTaps : tap - kTaps / 2",
                                "form.causal ? -tap : kTaps / 2 - tap"),
    "the wrong input": ("nodes + source_of(edge) * array", "nodes + (source_of(edge) + 1) % 4 * array"),
    "half of the bias": ("for (int m = 0; m < 2; ++m) multiply_16x8x16<Element>(column_sums[m]",
                         "for (int m = 0; m < 1; ++m) multiply_16x8x16<Element>(column_sums[m]"),
}  # fmt: skip
ADD = {
    "the last chunk is forgotten": ("chunk < ends[task + 1]; ++chunk", "chunk < ends[task + 1] - 1; ++chunk"),
    "the first task's place": ("static_cast<int64_t>(task) * kEdges + found / kMaps", "found / kMaps"),
    "the gate's place for the value": ("2 * edge + map - 1 : edge", "2 * edge + 2 - map : edge"),
}
SEEDED = [
    (kernel, name, mistake)
    for kernel, mistakes in (
        ("forward", COMMON | FORWARD), ("backward", BACKWARD), ("gradients", GRADIENTS), ("add", ADD),
    )
    for name, mistake in mistakes.items()
]  # fmt: skip


def is_seen(case: Case, mistake: tuple[str, str, str] | None) -> bool:
    call, seen = build(case), ()
    wanted = call.exact()
    for together in (1024, 256):
        names = () if mistake is not None and mistake[0] == "search_cell_forward" else None
        try:
            with mock.patch.object(machine, "_LANES_TOGETHER", together), cells_on_ptx_machine(mistake=mistake):
                found = call.gradients("cuda", names)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or re.search("nvcc failed|in the source", str(error)):
                raise  # nobody has seen the mistake
            return True
        seen = wrong(found, {name: wanted[name] for name in found}, call)
        if seen:
            return True
    return bool(seen)


@pytest.mark.parametrize(("kernel", "name", "mistake"), SEEDED, ids=[f"{k}: {n}" for k, n, _ in SEEDED])
def test_a_mistake_in_the_source_is_seen(kernel, name, mistake):
    assert any(is_seen(case, (f"search_cell_{kernel}", *mistake)) for case in SEEN_BY)


@pytest.mark.parametrize("case", SEEN_BY, ids=str)
def test_without_a_mistake_there_is_nothing_to_see(case):
    assert not is_seen(case, None)


def test_pieces_that_are_not_exchanged_cost_wavefronts():
    exchange = ("(piece ^ (row / kTogether % (8 / kTogether)))", "piece")
    for kernel in ("forward", "backward", "gradients"):
        with cells_on_ptx_machine(mistake=(f"search_cell_{kernel}", *exchange)) as launches:
            build(LARGE.with_(batch=(1, 20))).gradients("cuda")
        report = next(launch.report for launch in launches if launch.name == kernel)
        assert report.shared_wavefronts > 1.1 * report.shared_ideal_wavefronts
