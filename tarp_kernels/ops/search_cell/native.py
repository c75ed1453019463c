"""The csrc kernels of `search_cell`, called by pointer: tensors in, tensors out, no autograd here.

The kernels see the tokens alone: where there is padding they get a copy without it. A LayerNorm in front runs in
PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.search_cell import stems
from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.weights import OPERATIONS, CellWeights

_NAMES = CellWeights._fields[:12]


class Saved(NamedTuple):
    """What backward needs of forward."""

    nodes: Tensor  # s0, s1, n0, n1, n2 as the kernels lay them out
    active: Tensor  # where each selected operation's relu lets through


def forward(
    h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool, keep: bool
) -> tuple[Tensor, Saved | None]:
    """out in h's shape, and what backward needs where that is to be kept."""
    from tarp_kernels import _C

    call = _Call(h, weights, alpha, found, causal)
    out = torch.empty_like(call.tokens)
    saved = call.saved() if keep else None
    _C.search_cell_forward(*call.arguments, out.data_ptr(), *map(_pointer, saved or (None, None)), 0, 0)
    return found.with_padding(out.to(h.dtype), h), saved


def step(h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, state: Tensor) -> tuple[Tensor, Tensor]:
    """out in h's shape, and the state after it, for the state [sequences, 4, 4, C] float32 before it; causal."""
    from tarp_kernels import _C

    call = _Call(h, weights, alpha, found, True)
    out, before = torch.empty_like(call.tokens), _plain(state)
    after = torch.empty_like(before)
    _C.search_cell_forward(*call.arguments, out.data_ptr(), 0, 0, before.data_ptr(), after.data_ptr())
    return found.with_padding(out.to(h.dtype), h), after


def backward(
    dout: Tensor,
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    found: Layout,
    causal: bool,
    saved: Saved,
    needs: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients of the tensors named by `needs`, each in its tensor's dtype; none where no operation used it."""
    from tarp_kernels import _C

    call = _Call(h, weights, alpha, found, causal, every="alpha" in needs)
    dtokens = call.of_tokens(dout.reshape(-1, dout.shape[-1]))
    normed, stem = weights.norm is not None, {"h", "norm", "norm_bias"} & set(needs)
    dx = torch.empty_like(call.x) if stem else None
    dalpha = torch.zeros(call.alpha.shape) if "alpha" in needs else None
    used = [name for name in needs if name in _NAMES and call.selected(name)]
    gradients = {name: torch.zeros(getattr(weights, name).shape) for name in used}
    _C.search_cell_backward(
        *call.arguments,
        dtokens.data_ptr(),
        saved.nodes.data_ptr(),
        saved.active.data_ptr(),
        _pointer(dx),
        not normed,
        _pointer(dalpha),
        [_pointer(gradients.get(name)) for name in _NAMES],
    )
    result = {name: gradient.to(getattr(weights, name).dtype) for name, gradient in gradients.items()}
    if dx is not None:  # without a LayerNorm the kernels have added dtokens
        result |= stems.gradients(dx, dtokens, call.tokens, weights, found) if normed else {"h": dx}
        result["h"] = found.with_padding(result["h"].to(h.dtype), dout)
    if dalpha is not None:
        result["alpha"] = (dalpha if alpha.dim() == 3 else dalpha.sum(0)).to(alpha.dtype)
    return result


class _Call:
    """Sizes and tensors of a call as the kernels take them."""

    def __init__(
        self, h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, causal: bool, every: bool = False
    ):
        self.found, self.wide = found, weights.norm is not None
        self.tokens = self.of_tokens(h.reshape(-1, h.shape[-1]))
        self.x = stems.normed(self.tokens, weights, found) if self.wide else self.tokens
        tasks = len(found.parts)
        self.alpha = alpha.detach().to("cpu", torch.float32).expand(tasks, -1, -1).contiguous()
        chosen = (self.alpha != 0).flatten(0, 1).any(0).tolist() if tasks else [False] * len(OPERATIONS)
        self.chosen = dict(zip(OPERATIONS, chosen, strict=True))
        self.weights = [_plain(getattr(weights, name)) if every or self.selected(name) else None for name in _NAMES]
        self.offsets, self.task_sequences = found.sequence_ends(torch.device("cpu")), found.task_sequences()
        self.arguments = (
            (*self.tokens.shape, weights.width, len(self.offsets) - 1, tasks),
            (causal, weights.per_task, self.x.dtype == torch.bfloat16),
            self.offsets.data_ptr(),
            self.task_sequences.data_ptr(),
            self.x.data_ptr(),
            self.tokens.data_ptr(),
            [_pointer(tensor) for tensor in self.weights],
            self.alpha.data_ptr(),
            torch.get_num_threads(),
        )

    def saved(self) -> "Saved":
        from tarp_kernels import _C

        array, slots = _C.search_cell_sizes(*self.arguments)
        return Saved(torch.empty(5 * array), torch.empty(slots * array, dtype=torch.uint8))

    def of_tokens(self, rows: Tensor) -> Tensor:
        """The rows that are tokens, contiguous."""
        tokens = self.found.tokens(rows.detach())
        return (tokens.float() if self.wide else tokens).contiguous().resolve_neg()

    def selected(self, name: str) -> bool:
        """Whether a weight is needed: those of operations are where some edge selected one."""
        return self.chosen.get(name.removesuffix("_bias"), True)


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32."""
    return tensor.detach().to(torch.float32).contiguous().resolve_neg()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
