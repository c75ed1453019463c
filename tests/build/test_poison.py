"""The poisoned memory of tests/conftest.py: it must bite, and it must not disturb what tests do with torch."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_every_allocator_gives_nan(dtype):
    base = torch.zeros(2, 3, dtype=dtype)
    made = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty((2, 3), dtype=dtype, requires_grad=True),
        torch.empty_like(base),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        base.new_empty(2, 3),
        base.new_empty_strided((2, 3), (1, 2)),
    ]
    for tensor in made:
        assert tensor.shape == (2, 3) and tensor.dtype == dtype
        assert tensor.isnan().all()


def test_integers_get_their_largest_value():
    assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
    assert torch.empty(3, dtype=torch.bool).all()


def test_meta_tensors_and_layers_are_undisturbed():
    assert torch.empty(2, device="meta").is_meta
    assert torch.nn.Linear(3, 2).weight.isfinite().all()


@torch.library.custom_op("tarp_tests::halves", mutates_args=())
def halves(x: torch.Tensor, unwritten: bool) -> torch.Tensor:
    out = torch.empty_like(x)
    rows = x.shape[0] - int(unwritten)
    out[:rows] = x[:rows] / 2
    return out


@halves.register_fake
def _(x, unwritten):
    return torch.empty_like(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_that_a_custom_operator_forgets_is_seen(compiled):
    def call(x, unwritten):
        scratch = torch.empty_like(x)  # traced through the poisoned allocator
        return halves(x, unwritten) + scratch.zero_()

    run = torch.compile(call, backend="eager", fullgraph=True, dynamic=True) if compiled else call
    x = torch.randn(4, 3)
    torch.testing.assert_close(run(x, False), x / 2)
    assert run(x, True)[-1].isnan().all()
