"""Calls that break the contract of `search_cell`, with what the error must say."""

from typing import Any

import torch

from tarp_kernels import CellWeights


def good(shape: tuple[int, ...] = (2, 6, 8), dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    seeded = torch.Generator().manual_seed(0)
    sizes = CellWeights.shapes(8, 4)
    weights = {name: torch.randn(size, dtype=dtype, generator=seeded) for name, size in sizes.items()}
    alpha = torch.eye(6)[torch.tensor([5, 1, 2, 0, 3, 4, 1, 5, 2])]
    return {
        "h": torch.randn(shape, dtype=dtype, generator=seeded),
        "weights": CellWeights(**weights),
        "alpha": alpha,
    } | options


def put(**changes: Any):
    return lambda call: call | changes


def weight(**changes: Any):
    return lambda call: call | {"weights": call["weights"]._replace(**changes)}


PACKED = {"shape": (12, 8)}

# form, what breaks it, the exception, what the message says: the argument first, then parts
BAD: dict[str, tuple] = {
    "h is a list": ({}, put(h=[1.0]), TypeError, "h | list | torch.Tensor"),
    "h is integer": ({}, put(h=torch.ones(2, 6, 8, dtype=torch.int64)), TypeError, "h | torch.int64 | torch.float32"),
    "h has four dimensions": ({}, put(h=torch.ones(1, 2, 6, 8)), ValueError, "h | [1, 2, 6, 8] | [B, S, d]"),
    "h is sparse": ({}, put(h=torch.ones(2, 6, 8).to_sparse()), TypeError, "h | sparse | to_dense"),
    "causal is a number": ({}, put(causal=1), TypeError, "causal | int | True"),
    "weights are a dict": ({}, put(weights={}), TypeError, "weights | dict | CellWeights"),
    "a weight is missing": ({}, weight(conv3=None), TypeError, "weights.conv3 | NoneType | Tensor"),
    "norm without bias": ({}, weight(norm=torch.ones(8)), ValueError, "weights.norm_bias | both"),
    "conv taps last": (
        {},
        weight(conv5=torch.randn(9, 4, 4, 5)),
        ValueError,
        "weights.conv5 | [9, 4, 4, 5] | [9, 5, 4, 4]",
    ),
    "project of another d": ({}, weight(project=torch.randn(2, 4, 7)), ValueError, "weights.project | [2, 4, 8]"),
    "a weight in half": ({}, weight(glu=torch.ones(9, 2, 4, 4).half()), TypeError, "weights.glu | float16 | convert"),
    "weights on meta": (
        {},
        weight(linear=torch.ones(9, 4, 4, device="meta")),
        ValueError,
        "weights.linear | meta | cpu",
    ),
    "weights per task without segments": (
        {},
        lambda call: call | {"weights": call["weights"].map(lambda t: t[None])},
        ValueError,
        "weights.output | needs segments",
    ),
    "alpha flat": ({}, put(alpha=torch.ones(54)), ValueError, "alpha | [54] | [9, 6] | none, identity"),
    "alpha of operation indices": (
        {},
        put(alpha=torch.ones(9, 6, dtype=torch.int64)),
        TypeError,
        "alpha | torch.int64 | float",
    ),
    "alpha per task without segments": ({}, put(alpha=torch.ones(2, 9, 6)), ValueError, "alpha | needs segments"),
    "alpha for other tasks": (
        {"segments": torch.tensor([0, 6, 12])},
        put(alpha=torch.ones(3, 9, 6)),
        ValueError,
        "alpha | [3, 9, 6] | [2, 9, 6]",
    ),
    "mask of attention": (
        {},
        put(attention_mask=torch.ones(2, 1, 6, 6)),
        ValueError,
        "attention_mask | [2, 1, 6, 6] | [2, 6] | tokenizer",
    ),
    "cu_seqlens with a batch": ({}, put(cu_seqlens=torch.tensor([0, 12])), ValueError, "cu_seqlens | flatten"),
    "cu_seqlens too short": (PACKED, put(cu_seqlens=torch.tensor([0, 5])), ValueError, "cu_seqlens | 5 | 12"),
    "cu_seqlens falls": (PACKED, put(cu_seqlens=torch.tensor([0, 9, 5, 12])), ValueError, "cu_seqlens | from 9 to 5"),
    "segments are floats": ({}, put(segments=torch.tensor([0.0, 12.0])), TypeError, "segments | float32 | int64"),
    "segments start late": ({}, put(segments=torch.tensor([1, 12])), ValueError, "segments | starts at 1"),
    "backend is no name": ({}, put(backend="gpu"), ValueError, "backend | 'gpu' | reference"),
    "no kernel on a GPU": ({}, put(backend="cuda"), ValueError, "backend='cuda' | reference"),
}
