"""What search cells remember of rows and of host numbers: the same for the same, and nothing else for anything else."""

import weakref

import pytest
import torch

from tarp_kernels import CellWeights
from tarp_kernels.nn.task_parallel import Offsets
from tarp_kernels.ops import constants
from tarp_kernels.ops.search_cell import search_cell_with_layouts
from tarp_kernels.ops.search_cell.layout import Layouts, layout
from tests.search_cell.cases import Case, build

H = torch.zeros(2, 4, 3)
META, CPU = torch.device("meta"), torch.device("cpu")


def mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def test_the_same_arguments_are_looked_at_once():
    layouts, given, segments = Layouts(), mask(), torch.tensor([0, 4, 8])
    found = layouts(H, given, None, segments)
    assert found.rows.tolist() == [0, 1, 4, 5, 6, 7] and found.parts[1].sequences == [2, 6]
    assert layouts(torch.ones(2, 4, 7), given, None, segments) is found and layouts.held() == [found]
    for others in (
        (H, mask(), None, segments),
        (H, given, None, None),
        (H, None, None, segments),
        (H, given, None, torch.tensor([0, 8])),
        (H.view(1, 8, 3), given, None, segments),
        (H.flatten(0, 1), None, torch.tensor([0, 3, 8]), None),
    ):
        other, right = layouts(*others), layout(*others)
        assert other is not found and other.parts == right.parts
        assert (other.rows is None) == (right.rows is None)
    assert layouts(H, given, None, segments) is found


def test_what_was_written_in_place_is_looked_at_again():
    layouts, given, segments = Layouts(), mask(), torch.tensor([0, 4, 8])
    layouts(H, given, None, segments)
    given[0, 2] = 1
    assert layouts(H, given, None, segments).parts[0].end == 3
    segments[1] = 2
    assert [part.end for part in layouts(H, given, None, segments).parts] == [2, 7]


def test_masks_of_inference_mode_are_always_looked_at():
    """Nobody counts what is written there."""
    layouts = Layouts()
    with torch.inference_mode():
        given = mask()
        assert layouts(H, given, None, None).rows is not None
        given.fill_(1)
        assert layouts(H, given, None, None).rows is None


def test_a_mask_is_held_and_the_oldest_goes():
    layouts, given = Layouts(), mask()
    layouts(H, given, None, None)
    alive = weakref.ref(given)
    del given
    assert alive() is not None, "another mask could take its address"
    found = [layouts(H, mask(), None, None) for _ in range(Layouts.MOST + 3)]
    assert len({id(one) for one in found}) == len(found) and layouts.held() == found[3:] and alive() is None


def test_tables_are_made_once_for_each_device():
    found = layout(H, mask(), None, torch.tensor([0, 0, 4, 8]))
    for name, wanted in (
        ("task_ends", [0, 0, 2, 6]),
        ("sequence_ends", [0, 2, 6]),
        ("sequence_numbers", [0, 0, 1, 1, 1, 1]),
    ):
        make = getattr(found, name)
        assert make(CPU).tolist() == wanted and make(META).device == META
        assert make(CPU) is make(CPU) and make(META) is make(META)
    assert [tensor.tolist() for tensor in found.places(CPU)] == [[0, 1, 0, 1, 2, 3], [2, 2, 4, 4, 4, 4]]
    assert found.task_sequences().tolist() == [0, 0, 1, 2] and found.task_sequences() is found.task_sequences()
    assert found.neighbours(2, 0, CPU) is found.neighbours(2, 0, CPU)
    assert found.neighbours(2, 0, CPU) is not found.neighbours(2, 4, CPU)
    assert [found.neighbours(task, 4, CPU).tokens for task in range(3)] == [0, 2, 4]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
def test_what_inference_saw_serves_training(backend):
    """Autograd refuses to keep a tensor that was made in inference mode."""
    call, layouts = build(Case(padding=(("left", 3), ("right", 9), ("left", 0)))), Layouts()
    weights = CellWeights(**{name: tensor for name, tensor in call.tensors.items() if name not in ("h", "alpha")})
    alpha, mask = call.tensors["alpha"], call.options["attention_mask"]

    def run(h):
        return search_cell_with_layouts(layouts, h, weights, alpha, True, mask, backend=backend)

    with torch.inference_mode():
        seen = run(call.tensors["h"])
        tables = [constants.on(META, torch.tensor([1.5])), *layouts.held()[0].places(CPU)]
    assert not any(table.is_inference() for table in tables)
    h = call.tensors["h"].clone().requires_grad_()
    out = run(h)
    (found,) = torch.autograd.grad(out, h, call.dout)
    assert len(layouts.held()) == 1 and torch.equal(out, seen)
    torch.testing.assert_close(found, call.gradients(backend)["h"])


def test_segments_of_inference_mode_serve_training():
    offsets, x = Offsets(torch.tensor([0, 1, 2])), torch.zeros(2, 4, 3)
    with torch.inference_mode():
        segments = offsets.rows(x)
    assert not segments.is_inference() and offsets.rows(x) is segments


def test_equal_numbers_are_one_table(monkeypatch):
    monkeypatch.setattr(constants, "_held", {})
    numbers = torch.tensor([1.0, 0.0])
    table = constants.on(META, numbers)
    assert (table.device, table.dtype, table.shape) == (META, numbers.dtype, numbers.shape)
    assert constants.on(META, torch.tensor([1.0, 0.0], requires_grad=True)) is table
    assert constants.on(META, torch.tensor([[1.0, 1.0], [0.0, 1.0]])[:, 0]) is table, "strides do not matter"
    others = (torch.tensor([1.0, 0.5]), numbers.view(1, 2), numbers.view(torch.int32), torch.tensor([1.0]))
    for other in others:
        found = constants.on(META, other)
        assert found is not table and (found.dtype, found.shape) == (other.dtype, other.shape)
    assert len(constants.held()) == 5 and constants.held()[0] is table
    assert torch.equal(constants.on(CPU, others[0]), others[0]) and len(constants.held()) == 5


def test_the_table_that_nobody_asked_for_longest_goes(monkeypatch):
    monkeypatch.setattr(constants, "_held", {})
    monkeypatch.setattr(constants, "MOST", 2)
    one, two = (constants.on(META, torch.tensor([i])) for i in (1, 2))
    assert constants.on(META, torch.tensor([1])) is one
    three = constants.on(META, torch.tensor([3]))
    assert constants.on(META, torch.tensor([1])) is one and constants.held() == [three, one]
    assert constants.on(META, torch.tensor([2])) is not two
