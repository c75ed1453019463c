"""The stem of a cell, LayerNorm or nothing, where PyTorch runs it: for kernels that only know what comes out of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tarp_kernels.ops.search_cell.layout import Layout
from tarp_kernels.ops.search_cell.weights import CellWeights


def normed(tokens: Tensor, weights: CellWeights, found: Layout) -> Tensor:
    """LayerNorm of tokens [T, d] in their dtype, each task's by its own scale and shift."""
    norm, bias = weights.norm, weights.norm_bias
    assert norm is not None and bias is not None
    norm, bias, width = norm.to(tokens.dtype), bias.to(tokens.dtype), tokens.shape[-1:]
    if not weights.per_task:
        return F.layer_norm(tokens, width, norm, bias, weights.eps)
    parts = zip(found.parts, norm, bias, strict=True)
    each = [F.layer_norm(tokens[p.start : p.end], width, scale, shift, weights.eps) for p, scale, shift in parts]
    return torch.cat(each) if each else tokens


def gradients(dstem: Tensor, dtokens: Tensor, tokens: Tensor, weights: CellWeights, found: Layout) -> dict[str, Tensor]:
    """Of h, which reaches out through the stem and past the cell, and of norm and norm_bias where there are any."""
    if weights.norm is None or weights.norm_bias is None:
        return {"h": dstem + dtokens}
    with torch.enable_grad():
        h, norm, bias = (tensor.detach().requires_grad_() for tensor in (tokens, weights.norm, weights.norm_bias))
        out = normed(h, weights._replace(norm=norm, norm_bias=bias), found)
        dh, dnorm, dbias = torch.autograd.grad(out, (h, norm, bias), dstem)
    return {"h": dh + dtokens, "norm": dnorm, "norm_bias": dbias}
