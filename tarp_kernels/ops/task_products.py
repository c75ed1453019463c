"""Products of rows with their own task's matrix, in plain PyTorch without a wait for the device.

    contract  [T, K], [B, R, K] -> [T, R]     x_t q_bᵀ
    expand    [T, R], [B, R, K] -> [T, K]     z_t q_b
    reduce    [T, R], [T, K] -> [B, R, K]     Σ z_tᵀ x_t over the rows of task b

with b = tasks[t]; without tasks one matrix q [R, K] serves all rows. Each is differentiated by the other two, to any
order. They are dense products over all B·R rows of q, of which a row's own are kept: deterministic everywhere, which
sums over an index are not. Nothing that is not finite crosses from one task to another.
"""

import torch
from torch import Tensor


def tasks_of_rows(x: Tensor, segments: Tensor) -> Tensor:
    """The task of each row of x [T, K], int64 [T]; row offsets beyond T are clamped, as in kernels."""
    ends = segments[1:].to(x.device)
    rows = torch.arange(x.shape[0], dtype=ends.dtype, device=x.device)
    return torch.bucketize(rows, ends, right=True).clamp(max=max(ends.shape[0] - 1, 0))


def contract(x: Tensor, q: Tensor, tasks: Tensor | None) -> Tensor:
    """x [T, K], q [B, R, K] -> [T, R]."""
    return x @ q.mT if tasks is None else _Product.apply("contract", x, q, tasks, q.shape[0])


def expand(z: Tensor, q: Tensor, tasks: Tensor | None) -> Tensor:
    """z [T, R], q [B, R, K] -> [T, K]."""
    return z @ q if tasks is None else _Product.apply("expand", z, q, tasks, q.shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, a: Tensor, b: Tensor, tasks: Tensor, count: int) -> Tensor:
        ctx.name, ctx.count = name, count
        ctx.save_for_backward(a, b, tasks)
        own = tasks[:, None] == torch.arange(count, device=tasks.device)  # [T, B]
        if name == "contract":
            product = (a @ b.flatten(0, 1).mT).unflatten(1, b.shape[:2])
            return torch.where(own[..., None], product, 0).sum(1)
        spread = torch.where(own[..., None], a[:, None], 0).flatten(1)  # [T, B R]
        if name == "expand":
            return spread @ _finite(b).flatten(0, 1) + _trouble(b.flatten(1))[tasks, None]
        trouble = torch.where(own, _trouble(b)[:, None], 0).sum(0)  # [B]
        return (spread.mT @ _finite(b)).unflatten(0, (count, a.shape[1])) + trouble[:, None, None]

    @staticmethod
    def backward(ctx, g):
        a, b, tasks = ctx.saved_tensors

        def product(name: str, *factors: Tensor) -> Tensor:
            return _Product.apply(name, *factors, tasks, ctx.count)

        if ctx.name == "contract":  # x, q
            first, second = ("expand", g, b), ("reduce", g, a)
        elif ctx.name == "expand":  # z, q
            first, second = ("contract", g, b), ("reduce", a, g)
        else:  # z, x
            first, second = ("contract", b, g), ("expand", a, g)
        _, wanted_a, wanted_b, *_ = ctx.needs_input_grad
        return None, product(*first) if wanted_a else None, product(*second) if wanted_b else None, None, None


def _finite(tensor: Tensor) -> Tensor:
    """What is not finite replaced by 0, because 0 · NaN would reach the rows of other tasks."""
    return tensor.nan_to_num(0, 0, 0)


def _trouble(tensor: Tensor) -> Tensor:
    """NaN for each row with anything that is not finite, else 0."""
    return (tensor * 0).sum(1)
