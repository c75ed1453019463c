"""Forward, backward and double backward of `search_cell`."""

from torch import Tensor

from tarp_kernels.ops.search_cell import reference
from tarp_kernels.ops.search_cell.layout import layout
from tarp_kernels.ops.search_cell.weights import CellWeights


def apply(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    backend: str,
) -> Tensor:
    """out for checked arguments."""
    found = layout(h, attention_mask, cu_seqlens, segments)
    return reference.search_cell(h, weights, alpha, found, causal=causal)[0]


def step(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    state: Tensor,
    attention_mask: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, state) for checked arguments."""
    found = layout(h, attention_mask, None, segments)
    out, after = reference.search_cell(h, weights, alpha, found, causal=True, state=state)
    assert after is not None
    return out, after.detach()
