"""`linear_cross_entropy`: the loss of each row behind an output head, without the logits of all rows at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels import backends
from tarp_kernels.ops.dispatch import needs_dispatcher
from tarp_kernels.ops.lowrank_linear import native
from tarp_kernels.ops.lowrank_linear.contract import Form, Operands

LOGITS = 2**22  # most logits at once, 16 MB: more fall out of the last cache, and 1240 x 8192 took 1.3 times as long
ROWS = 256  # but at least so many rows: with 128, reading a vocabulary of 49152 anew cost 10 %
DEPTH = 2048  # columns of the logits that one product takes: a panel of W as deep as the vocabulary leaves the cache
_FORM = Form("diag", "silu", "none", "one_plus", 1.0, 0.0, 0, "cpu")


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """-log softmax(x Wᵀ + b)[target] of each row: [S], float32 (float64 stays).

    x        [S, K]
    weight   [N, K] in x's dtype, bias [N] or None
    targets  int64 [S], each from 0 to N - 1; leave rows without a target out

    A frozen head in float32 on the CPU runs in blocks of rows, and the gradient of x is made along with the loss, so
    that no logits wait for backward: 2.1 to 2.7 times as fast as F.linear and F.cross_entropy, which run elsewhere.
    Twice differentiable. Raises TypeError or ValueError that names the argument.
    """
    _check(x, weight, bias, targets)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    plain = trained or x.dtype != torch.float32 or needs_dispatcher(x) or torch.is_autocast_enabled(x.device.type)
    if plain or backends.choose(None, x.dtype, x.device) != "cpu":
        logits = F.linear(x, weight, bias)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="none")
    if torch.is_grad_enabled() and x.requires_grad:
        return _LinearCrossEntropy.apply(x, weight, bias, targets)
    return _by_blocks(x, weight, bias, targets, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        losses, slopes = _by_blocks(x, weight, bias, targets, True)
        ctx.save_for_backward(x, weight, bias, targets, slopes)
        return losses

    @staticmethod
    def backward(ctx, gradient):
        x, weight, bias, targets, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the same as a function that can be differentiated again
            slopes = F.linear(x, weight, bias).softmax(1) @ weight - weight[targets]
        return gradient.unsqueeze(1) * slopes, None, None, None


def _by_blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses [S], and each one's gradient in its own row of x: softmax(x Wᵀ + b) W - W[target], [S, K]."""
    losses = x.new_empty(x.shape[0])
    slopes = torch.empty_like(x) if needs_slopes else None
    rows = max(ROWS, LOGITS // weight.shape[0])
    for start in range(0, x.shape[0], rows):
        block, wanted = slice(start, start + rows), targets[start : start + rows]
        logits = _product(x[block], weight, bias)
        shares = logits.softmax(1)
        # by way of the largest share: half the time of a log_softmax and its exp
        behind = logits.amax(1) - logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
        losses[block] = behind - shares.amax(1).log_()
        if slopes is not None:
            sums = -weight[wanted]
            for n in range(0, weight.shape[0], DEPTH):
                sums += _product(shares[:, n : n + DEPTH], weight[n : n + DEPTH].t(), None)
            slopes[block] = sums
    return losses, slopes


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by the kernel of `lowrank_linear` at rank 0: twice as fast as PyTorch's on CPUs that are not Intel's."""
    nothing = x.new_empty(weight.shape[0], 0)
    return native.forward(Operands(x, weight, bias, x.new_empty(0, x.shape[1]), nothing, *(None,) * 6), None, _FORM)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight: got shape {list(weight.shape)} for x {list(x.shape)}, expected [N, K] for x [S, K]; flatten x"
        )
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"weight: got dtype {weight.dtype}, expected {x.dtype} like x; convert one of them")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}], one a row of weight")
    if targets.dtype != torch.int64 or tuple(targets.shape) != (x.shape[0],):
        came = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"targets: got {came}, expected int64 [{x.shape[0]}], one for each row of x")
    if targets.device.type == "cpu" and targets.numel():  # elsewhere nobody waits for the values
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets: go from {low} to {high}, expected 0 to {weight.shape[0] - 1}; leave out rows without one"
            )
