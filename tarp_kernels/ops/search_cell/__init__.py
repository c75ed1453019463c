"""`search_cell`: a small network beside a feed-forward block, of which only the selected operations run."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops.search_cell import autograd, cuda_plans
from tarp_kernels.ops.search_cell.contract import check, check_step
from tarp_kernels.ops.search_cell.layout import Layout, layout
from tarp_kernels.ops.search_cell.weights import OPERATIONS, STATE_ROWS, CellWeights

__all__ = ["OPERATIONS", "CellWeights", "search_cell", "search_cell_step"]


def search_cell(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    *,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out = h + Linear((n0 + n1 + n2) / 3), where each node sums alpha[edge, m] · op_m(input) over its edges:

        s0, s1 = relu(Linear(stem(h)))            d → C
        n0 = o0(s0) + o1(s1)
        n1 = o2(s0) + o3(s1) + o4(n0)
        n2 = o5(s0) + o6(s1) + o7(n0) + o8(n1)

    Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), section 3.3. The six operations
    are none, identity, linear relu(Linear), glu Linear ⊙ sigmoid(Linear), conv3 and conv5 relu(Conv1d). Here
    convolutions are causal by default, which the published cell is not, and padding does not flow.

    Masked execution: an operation runs only where its alpha is not zero, and a node that nothing reaches is not
    computed. Operations with alpha = 0 run in backward if alpha asks for a gradient, which is ⟨∂L/∂node, op(input)⟩ for
    every operation, and are not kept; otherwise never. An operation that no edge selected leaves its weights without
    gradient (None); edges that did not select it get zeros beside those that did.

    h               [B, S, d] or packed rows [T, d]; float32, bfloat16, float16 or float64
    weights         `CellWeights` in h's dtype or float32; with segments each tensor may have a leading task dimension
    alpha           [9, 6], any float dtype, on the CPU or beside h; with segments also [tasks, 9, 6]. Its values are
                    read on the host, so one on a device waits for it
    causal          True: position t sees t, t-1, ... (decoders); False: both sides (encoders)
    attention_mask  h.shape[:-1], 0 for padding, or None. The tokens' results are those without padding; where
                    padding lies, out = h
    cu_seqlens      int32 or int64 offsets [sequences + 1] over packed rows [T, d]; convolutions stop at sequence ends
    segments        int32 or int64 offsets [tasks + 1] over the rows (h flattened to [-1, d], padding counted); the
                    end of a task is the end of a sequence
    backend         "reference" | "cpu" | "triton" | "cuda"; None chooses

    Returns out in h's shape and dtype: accumulated in float32 (float64 for float64) and rounded once; autocast changes
    nothing. Twice differentiable in h, alpha and every weight. Under torch.compile one graph serves every alpha;
    weights that no edge selected get zeros there, backward runs forward again, and second derivatives are an error.
    Raises TypeError or ValueError that names the argument, what came, what was expected and the fix.
    """
    return search_cell_with_layouts(layout, h, weights, alpha, causal, attention_mask, cu_seqlens, segments, backend)


def search_cell_with_layouts(
    layouts: Callable[..., Layout],
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`search_cell` for callers with several calls on the same rows: `layouts` remembers what the first one saw."""
    check(h, weights, alpha, causal, attention_mask, cu_seqlens, segments)
    chosen = backends.choose(backend, h.dtype, h.device, partial(cuda_plans.refusal, h, weights))
    arguments = (h, weights, alpha, causal, attention_mask, cu_seqlens, segments, chosen, layouts)
    if h.device.type == "meta" or not torch.is_autocast_enabled(h.device.type):  # which knows no meta device
        return autograd.apply(*arguments)
    with torch.autocast(h.device.type, enabled=False):
        return autograd.apply(*arguments)


def search_cell_step(
    h: Tensor,
    weights: CellWeights,
    alpha: Tensor,
    state: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`search_cell` for the next tokens of B sequences, as decoding with a cache needs it: (out, state after them).

    Chunk by chunk gives what one causal call on the whole sequences gives. Arguments as for `search_cell`, h [B, S, d].

    attention_mask  [B, S], of these tokens only; padding, on either side, leaves the state as it is
    segments        as for `search_cell`; a task is a number of whole sequences
    state           [B, 4, 4, C] float32 (float64 for float64), the sequences first, so that beam search may reorder it
                    with `index_select`: the last four tokens' s0, s1, n0, n1. None where the sequences begin

    backend         "reference" | "cpu" | "triton"; None chooses. Where h, alpha or a weight asks for a gradient, the
                    reference formulas run on every one of them

    No gradient flows into the state.
    """
    check(h, weights, alpha, True, attention_mask, None, segments)
    check_step(h, weights, state, segments)
    cuda = partial(cuda_plans.refusal, h, weights, with_state=True)
    chosen = backends.choose(backend, h.dtype, h.device, cuda)
    if state is None:
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        state = h.new_zeros(h.shape[0], 4, STATE_ROWS, weights.width, dtype=dtype)
    if h.shape[:-1].numel() == 0:
        return h.clone(), state
    with torch.autocast(h.device.type, enabled=False):
        return autograd.step(h, weights, alpha, state.detach(), attention_mask, segments, chosen)
