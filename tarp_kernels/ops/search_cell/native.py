"""The csrc kernels of `search_cell`, called by pointer: tensors in, tensors out, no autograd here.

The kernels see the tokens alone: where there is padding they get a copy without it. A LayerNorm in front runs in
PyTorch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tarp_kernels.ops.search_cell import reference
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
    return call.with_padding(out, h), saved


def step(h: Tensor, weights: CellWeights, alpha: Tensor, found: Layout, state: Tensor) -> tuple[Tensor, Tensor]:
    """out in h's shape, and the state after it, for the state [sequences, 4, 4, C] float32 before it; causal."""
    from tarp_kernels import _C

    call = _Call(h, weights, alpha, found, True)
    out, before = torch.empty_like(call.tokens), _plain(state)
    after = torch.empty_like(before)
    _C.search_cell_forward(*call.arguments, out.data_ptr(), 0, 0, before.data_ptr(), after.data_ptr())
    return call.with_padding(out, h), after


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
    rows = dout.reshape(-1, dout.shape[-1])
    dtokens = call.of_tokens(rows)
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
    if dx is not None and normed:
        result |= _stem_backward(dx, call.tokens, weights, found, needs)
        dx = result["h"] + dtokens if "h" in needs else None
    if dx is not None and "h" in needs:
        dx = dx.to(h.dtype)
        result["h"] = (dx if found.rows is None else rows.index_copy(0, found.rows, dx)).reshape(h.shape)
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
        self.x = _stem(self.tokens, weights, found) if self.wide else self.tokens
        tasks = len(found.parts)
        self.alpha = alpha.detach().to("cpu", torch.float32).expand(tasks, -1, -1).contiguous()
        chosen = (self.alpha != 0).flatten(0, 1).any(0).tolist() if tasks else [False] * len(OPERATIONS)
        self.chosen = dict(zip(OPERATIONS, chosen, strict=True))
        self.weights = [_plain(getattr(weights, name)) if every or self.selected(name) else None for name in _NAMES]
        sequences = [
            (start, end)
            for part in found.parts
            for start, end in zip(part.sequences[:-1], part.sequences[1:], strict=True)
        ]
        counts = torch.tensor([0, *(len(part.sequences) - 1 for part in found.parts)]).cumsum(0)
        self.offsets = torch.tensor([0, *(end for _, end in sequences)])
        self.task_sequences = counts
        self.arguments = (
            (*self.tokens.shape, weights.width, len(sequences), tasks),
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

    def with_padding(self, out: Tensor, h: Tensor) -> Tensor:
        """The tokens' results among the rows of h that are padding, in h's shape and dtype."""
        rows, out = h.reshape(-1, h.shape[-1]), out.to(h.dtype)
        return (out if self.found.rows is None else rows.index_copy(0, self.found.rows, out)).reshape(h.shape)

    def of_tokens(self, rows: Tensor) -> Tensor:
        """The rows that are tokens, contiguous."""
        tokens = rows.detach() if self.found.rows is None else rows.detach()[self.found.rows]
        return (tokens.float() if self.wide else tokens).contiguous().resolve_neg()

    def selected(self, name: str) -> bool:
        """Whether a weight is needed: those of operations are where some edge selected one."""
        return self.chosen.get(name.removesuffix("_bias"), True)


def _stem(tokens: Tensor, weights: CellWeights, found: Layout) -> Tensor:
    """LayerNorm, by each task's own scale and shift."""
    assert weights.norm is not None and weights.norm_bias is not None
    weights = weights._replace(norm=weights.norm.float(), norm_bias=weights.norm_bias.float())
    if not weights.per_task:
        return reference.stem(tokens, weights)
    parts = [reference.stem(tokens[part.start : part.end], weights.of_task(i)) for i, part in enumerate(found.parts)]
    return torch.cat(parts) if parts else tokens


def _stem_backward(
    dx: Tensor, tokens: Tensor, weights: CellWeights, found: Layout, needs: Sequence[str]
) -> dict[str, Tensor]:
    """Gradients of h, norm and norm_bias through the LayerNorm."""
    tensors = {"h": tokens, "norm": weights.norm, "norm_bias": weights.norm_bias}
    leaves: dict[str, Any] = {
        name: t.detach().requires_grad_(name in needs) for name, t in tensors.items() if t is not None
    }
    with torch.enable_grad():
        x = _stem(leaves["h"], weights._replace(norm=leaves["norm"], norm_bias=leaves["norm_bias"]), found)
    names = [name for name in leaves if name in needs]
    return dict(zip(names, torch.autograd.grad(x, [leaves[name] for name in names], dx), strict=True))


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32."""
    return tensor.detach().to(torch.float32).contiguous().resolve_neg()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
