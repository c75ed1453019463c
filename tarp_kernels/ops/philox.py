"""Philox4x32-10 in plain PyTorch: the counter-based generator behind seeded dropout.

Element i of a tensor draws the first word of Philox4x32-10 with counter (i mod 2³², i div 2³², 0, 0) and key
(seed mod 2³², seed div 2³²). No state and no stored mask: forward, backward and every backend recompute the same bits.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b. Split in 16-bit halves, because a full product overflows int64."""
    low = a * (b & 0xFFFF)  # < 2⁴⁸
    high = a * (b >> 16)  # < 2⁴⁸
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def first_word(index: Tensor, seed: int) -> Tensor:
    """index: int64 tensor of counters ≥ 0 -> int64 tensor of uniform 32-bit words."""
    c0, c1 = index & _WORD, index >> 32
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0


def drop_threshold(p: float) -> int:
    """A word below this is a dropped element."""
    return round(p * 2**32)


def keep_mask(shape, p: float, seed: int, device=None) -> Tensor:
    """Boolean mask of the elements that dropout with probability p keeps, counted row-major."""
    total = 1
    for size in shape:
        total *= size
    index = torch.arange(total, dtype=torch.int64, device=device)
    return (first_word(index, seed) >= drop_threshold(p)).reshape(shape)
