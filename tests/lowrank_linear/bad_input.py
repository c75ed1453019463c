"""Everything that callers get wrong: how a good call becomes a bad one, and what the error must say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tarp_kernels.backends import why_unavailable
from tests.lowrank_linear.cases import Case, build

Arguments = dict[str, Any]


REFUSALS = {
    name: "cannot run here | reference" if why_unavailable(name) else "x lies on cpu | a CUDA device"
    for name in ("cuda", "triton")
}


def good(**changes: Any) -> Arguments:
    """Arguments of a call that works: T = 6, K = 7, N = 5, r = 3."""
    call = build(Case(shape=(6, 7, 5), rank=3, hidden=4, b1=True, b2=True).with_(**changes))
    return {
        "x": call.x,
        "weight": call.weight,
        "bias": call.bias,
        "V": call.V,
        "U": call.U,
        "generator": call.generator,
        **call.options,
    }


def with_(**changes: Any) -> Callable[[Arguments], Arguments]:
    """Change arguments; a function is applied to the good one."""

    def mutate(arguments: Arguments) -> Arguments:
        return arguments | {n: c(arguments[n]) if callable(c) else c for n, c in changes.items()}

    return mutate


def generator_with(**changes: Any) -> Callable[[Arguments], Arguments]:
    def mutate(arguments: Arguments) -> Arguments:
        old = arguments["generator"]
        new = {n: c(getattr(old, n)) if callable(c) else c for n, c in changes.items()}
        return arguments | {"generator": old._replace(**new)}

    return mutate


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :-1]


LINEAR, MLP = {}, {"generator": "mlp"}
SEGMENTED = {"segments": "few", "shape": (0, 7, 5)}  # offsets 0, 2, 2, 3
FULL = {"sigma": "full"}
HALF = {"dtype": torch.bfloat16}

# (form of the good call, what is done to it, exception, parts of the message, its beginning first)
BAD: dict[str, tuple[dict, Callable, Any, str]] = {
    # kinds
    "x is a list": (LINEAR, with_(x=[[1.0] * 7]), TypeError, "x | list | torch.Tensor"),
    "x is an array": (LINEAR, with_(x=np.zeros((6, 7), np.float32)), TypeError, "x | ndarray | torch.Tensor"),
    "x is None": (LINEAR, with_(x=None), TypeError, "x | NoneType | torch.Tensor"),
    "weight is None": (LINEAR, with_(weight=None), TypeError, "weight | NoneType | torch.Tensor"),
    "weight is a layer": (
        LINEAR,
        with_(weight=lambda w: torch.nn.Linear(7, 5)),
        TypeError,
        "weight | Linear | Tensor",
    ),
    "bias is a number": (LINEAR, with_(bias=1.0), TypeError, "bias | float | torch.Tensor"),
    "V is None": (LINEAR, with_(V=None), TypeError, "V | NoneType | torch.Tensor"),
    "U is a list": (LINEAR, with_(U=[1.0]), TypeError, "U | list | torch.Tensor"),
    "generator is a tensor": (LINEAR, with_(generator=lambda g: g.w1), TypeError, "generator | Tensor | Generator"),
    "generator is a tuple": (LINEAR, with_(generator=tuple), TypeError, "generator | tuple | Generator"),
    "generator is a name": (LINEAR, with_(generator="linear"), TypeError, "generator | str | Generator"),
    "generator is a number": (LINEAR, with_(generator=1), TypeError, "generator | int | Generator"),
    "generator is a layer": (
        LINEAR,
        with_(generator=lambda g: torch.nn.Linear(7, 3)),
        TypeError,
        "generator | Linear | Generator",
    ),
    "w1 is None": (LINEAR, generator_with(w1=None), TypeError, "generator.w1 | NoneType | torch.Tensor"),
    "b1 is a number": (LINEAR, generator_with(b1=0.0), TypeError, "generator.b1 | float | torch.Tensor"),
    # width
    "x is a scalar": (LINEAR, with_(x=torch.tensor(1.0)), ValueError, "x | scalar | [..., K]"),
    "x is too narrow": (LINEAR, with_(x=cut), ValueError, "weight | [5, 7] | 6 | [N, K]"),
    "weight is transposed": (
        LINEAR,
        with_(weight=lambda w: w.t()),
        ValueError,
        "weight | [7, 5] | 7 | transposed",
    ),
    "weight is a vector": (LINEAR, with_(weight=lambda w: w[0]), ValueError, "weight | [7] | [N, K]"),
    "weight has tasks": (LINEAR, with_(weight=lambda w: w[None]), ValueError, "weight | [1, 5, 7] | [N, K]"),
    "bias is too short": (LINEAR, with_(bias=cut), ValueError, "bias | [4] | 5 | [N]"),
    "bias is a matrix": (LINEAR, with_(bias=lambda b: b[None]), ValueError, "bias | [1, 5] | [N]"),
    "bias broadcasts": (LINEAR, with_(bias=lambda b: b[:1]), ValueError, "bias | [1] | 5"),
    "V is too narrow": (LINEAR, with_(V=cut), ValueError, "V | [3, 6] | 7 | [r, K]"),
    "V is a vector": (LINEAR, with_(V=lambda v: v[0]), ValueError, "V | [7] | [r, K]"),
    "U is too short": (LINEAR, with_(U=lambda u: u[:-1]), ValueError, "U | [4, 3] | 5 | [N, r]"),
    "w1 is too narrow": (LINEAR, generator_with(w1=cut), ValueError, "generator.w1 | [3, 6] | 7 | K"),
    # rank
    "rank 0": (LINEAR, with_(V=lambda v: v[:0], U=lambda u: u[:, :0]), ValueError, "V | r = 0 | r ≥ 1"),
    "U of another rank": (LINEAR, with_(U=cut), ValueError, "U | [5, 2] | 3 | [N, r]"),
    "U is transposed": (LINEAR, with_(U=lambda u: u.t()), ValueError, "U | [3, 5] | [N, r]"),
    "w1 of another rank": (
        LINEAR,
        generator_with(w1=lambda w: w[:2]),
        ValueError,
        "generator.w1 | [2, 7] | 3 | diag",
    ),
    "w1 of a full sigma": (LINEAR, with_(sigma="full"), ValueError, "generator.w1 | [3, 7] | 9 | full"),
    "w1 of a diagonal sigma": (FULL, with_(sigma="diag"), ValueError, "generator.w1 | [9, 7] | 3 | diag"),
    "b1 is too short": (LINEAR, generator_with(b1=cut), ValueError, "generator.b1 | [2] | 3"),
    "hidden width 0": (
        MLP,
        generator_with(w1=lambda w: w[:0], b1=None, w2=lambda w: w[:, :0]),
        ValueError,
        "generator.w1 | m = 0 | m ≥ 1",
    ),
    "w2 of another width": (MLP, generator_with(w2=cut), ValueError, "generator.w2 | [3, 3] | 4 | [S, m]"),
    "w2 of another rank": (MLP, generator_with(w2=lambda w: w[:2]), ValueError, "generator.w2 | [2, 4] | 3"),
    "b2 is too short": (MLP, generator_with(b2=cut), ValueError, "generator.b2 | [2] | 3"),
    "b2 without w2": (
        MLP,
        generator_with(w1=lambda w: w[:3], b1=None, w2=None),
        ValueError,
        "generator.b2 | w2 | None",
    ),
    # dtype
    "x is integer": (LINEAR, with_(x=lambda x: x.long()), TypeError, "x | torch.int64 | torch.float32"),
    "x is complex": (LINEAR, with_(x=lambda x: x.to(torch.complex64)), TypeError, "x | complex64 | float32"),
    "x is boolean": (LINEAR, with_(x=lambda x: x > 0), TypeError, "x | torch.bool | torch.float32"),
    "x alone is bfloat16": (LINEAR, with_(x=lambda x: x.bfloat16()), TypeError, "weight | float32 | bfloat16"),
    "weight is float64": (LINEAR, with_(weight=lambda w: w.double()), TypeError, "weight | float64 | float32"),
    "bias stayed float32": (HALF, with_(bias=lambda b: b.float()), TypeError, "bias | float32 | bfloat16"),
    "V is half": (LINEAR, with_(V=lambda v: v.half()), TypeError, "V | float16 | float32"),
    "V is the other half": (
        HALF,
        with_(V=lambda v: v.half()),
        TypeError,
        "V | float16 | bfloat16 or torch.float32",
    ),
    "U is integer": (LINEAR, with_(U=lambda u: u.int()), TypeError, "U | int32 | float32"),
    "U is float64": (LINEAR, with_(U=lambda u: u.double()), TypeError, "U | float64 | float32"),
    "w1 is float64": (
        LINEAR,
        generator_with(w1=lambda w: w.double()),
        TypeError,
        "generator.w1 | float64 | float32",
    ),
    "b2 is half": (MLP, generator_with(b2=lambda b: b.half()), TypeError, "generator.b2 | float16 | float32"),
    # device
    "weight is elsewhere": (
        LINEAR,
        with_(weight=lambda w: w.to("meta")),
        ValueError,
        "weight | meta | cpu | .to(",
    ),
    "x is elsewhere": (LINEAR, with_(x=lambda x: x.to("meta")), ValueError, "weight | cpu | meta | .to("),
    "V is elsewhere": (LINEAR, with_(V=lambda v: v.to("meta")), ValueError, "V | meta | cpu | .to("),
    "w1 is elsewhere": (LINEAR, generator_with(w1=lambda w: w.to("meta")), ValueError, "generator.w1 | meta | cpu"),
    # segments
    "segments is a list": (
        SEGMENTED,
        with_(segments=[0, 2, 2, 3]),
        TypeError,
        "segments | list | int64 | torch.tensor",
    ),
    "segments is float": (SEGMENTED, with_(segments=lambda s: s.float()), TypeError, "segments | float32 | int64"),
    "segments is int16": (SEGMENTED, with_(segments=lambda s: s.short()), TypeError, "segments | int16 | int32"),
    "segments is a matrix": (SEGMENTED, with_(segments=lambda s: s[None]), ValueError, "segments | [1, 4] | [B+1]"),
    "segments is empty": (SEGMENTED, with_(segments=lambda s: s[:0]), ValueError, "segments | [0] | [B+1]"),
    "segments starts late": (
        SEGMENTED,
        with_(segments=torch.tensor([1, 2, 2, 3])),
        ValueError,
        "segments | starts at 1 | 0",
    ),
    "segments starts early": (
        SEGMENTED,
        with_(segments=torch.tensor([-1, 2, 2, 3])),
        ValueError,
        "segments | starts at -1 | 0",
    ),
    "segments ends early": (
        SEGMENTED,
        with_(segments=torch.tensor([0, 2, 2, 2])),
        ValueError,
        "segments | ends at 2 | 3",
    ),
    "segments ends late": (
        SEGMENTED,
        with_(segments=torch.tensor([0, 2, 2, 4])),
        ValueError,
        "segments | ends at 4 | 3",
    ),
    "segments falls": (
        SEGMENTED,
        with_(segments=torch.tensor([0, 2, 1, 3])),
        ValueError,
        "segments | from 2 to 1 | task 1 | never fall",
    ),
    "segments has too many tasks": (
        SEGMENTED,
        with_(segments=torch.tensor([0, 1, 2, 2, 3])),
        ValueError,
        "V | 3 | 4 | [B, r, K]",
    ),
    "segments without tasks in V": (SEGMENTED, with_(V=lambda v: v[0]), ValueError, "V | [3, 7] | [B, r, K]"),
    "segments without tasks in U": (SEGMENTED, with_(U=lambda u: u[0]), ValueError, "U | [5, 3] | [B, N, r]"),
    "segments without tasks in w1": (
        SEGMENTED,
        generator_with(w1=lambda w: w[0]),
        ValueError,
        "generator.w1 | [3, 7] | B",
    ),
    "segments without tasks in b1": (
        SEGMENTED,
        generator_with(b1=lambda b: b[0]),
        ValueError,
        "generator.b1 | [3] | B",
    ),
    "tasks without segments": (SEGMENTED, with_(segments=None), ValueError, "V | [3, 3, 7] | segments"),
    "U of other tasks": (SEGMENTED, with_(U=lambda u: u[:2]), ValueError, "U | [2, 5, 3] | [B, N, r]"),
    # names and numbers
    "sigma is unknown": (LINEAR, with_(sigma="diagonal"), ValueError, "sigma | 'diagonal' | 'diag' | 'full'"),
    "sigma is None": (LINEAR, with_(sigma=None), ValueError, "sigma | None | 'diag'"),
    "sigma is a list": (LINEAR, with_(sigma=["diag"]), ValueError, "sigma | ['diag'] | 'diag'"),
    "activation is unknown": (
        LINEAR,
        generator_with(activation="relu6"),
        ValueError,
        "activation | 'relu6' | one_plus",
    ),
    "hidden activation is unknown": (
        MLP,
        generator_with(hidden_activation="elu"),
        ValueError,
        "hidden_activation | 'elu' | gelu",
    ),
    "scaling is a tensor": (
        LINEAR,
        with_(scaling=torch.tensor(2.0)),
        TypeError,
        "scaling | Tensor | number | .item()",
    ),
    "scaling is a name": (LINEAR, with_(scaling="2"), TypeError, "scaling | str | number"),
    "scaling is None": (LINEAR, with_(scaling=None), TypeError, "scaling | NoneType | number"),
    "scaling is a flag": (LINEAR, with_(scaling=True), TypeError, "scaling | bool | number"),
    "dropout is a number": (LINEAR, with_(dropout=0.1), TypeError, "dropout | 0.1 | (p, seed)"),
    "dropout has three parts": (LINEAR, with_(dropout=(0.1, 1, 2)), TypeError, "dropout | (0.1, 1, 2) | (p, seed)"),
    "dropout of everything": (LINEAR, with_(dropout=(1.0, 1)), ValueError, "dropout | 1.0 | p < 1"),
    "dropout is negative": (LINEAR, with_(dropout=(-0.1, 1)), ValueError, "dropout | -0.1 | 0 ≤ p"),
    "dropout is NaN": (LINEAR, with_(dropout=(float("nan"), 1)), ValueError, "dropout | nan | 0 ≤ p"),
    "dropout of a name": (LINEAR, with_(dropout=("0.1", 1)), ValueError, "dropout | '0.1' | p"),
    "seed is a float": (LINEAR, with_(dropout=(0.1, 1.5)), TypeError, "dropout | float | int"),
    "seed is None": (LINEAR, with_(dropout=(0.1, None)), TypeError, "dropout | NoneType | int"),
    "seed is negative": (LINEAR, with_(dropout=(0.1, -1)), ValueError, "dropout | -1 | 0 ≤ seed"),
    "seed is too large": (LINEAR, with_(dropout=(0.1, 2**63)), ValueError, "dropout | 9223372036854775808 | 2**63"),
    # a layout that is no strided matrix
    "weight is sparse": (LINEAR, with_(weight=lambda w: w.to_sparse()), (TypeError, ValueError), "weight | sparse"),
    "x is sparse": (LINEAR, with_(x=lambda x: x.to_sparse()), (TypeError, ValueError), "x | sparse"),
    # backend
    "backend is unknown": (LINEAR, with_(backend="gpu"), ValueError, "backend | 'gpu' | reference"),
    "backend is no name": (LINEAR, with_(backend=3), ValueError, "backend | 3 | reference"),
    # on a machine without a GPU, and with one for tensors on the CPU
    "cuda cannot run here": (LINEAR, with_(backend="cuda"), ValueError, f"backend='cuda' | {REFUSALS['cuda']}"),
    "triton cannot run here": (LINEAR, with_(backend="triton"), ValueError, f"backend='triton' | {REFUSALS['triton']}"),
}
CPU_BAD = {
    "float64 on the cpu backend": (
        {"dtype": torch.float64},
        TypeError,
        "backend='cpu' | float64 | float32 | reference",
    ),
    "float16 on the cpu backend": (
        {"dtype": torch.float16},
        TypeError,
        "backend='cpu' | float16 | bfloat16 | reference",
    ),
}
