"""Mistakes in a search cell, for gates to notice."""

import importlib

import torch

from tarp_kernels.nn import cell_beside
from tarp_kernels.ops.search_cell import search_cell as RIGHT


def output_off(h, weights, alpha, **options):
    out = RIGHT(h, weights, alpha, **options)
    return h + (out - h) * 1.002


def idle(h, weights, alpha, **options):
    return h + 0 * RIGHT(h, weights, alpha, **options)


def acausal(h, weights, alpha, **options):
    return RIGHT(h, weights, alpha, **options | {"causal": False})


def another_operation(h, weights, alpha, **options):
    other = alpha.clone()
    other[..., 6, :] = other[..., 5, :]  # conv3 where conv5 was selected
    return RIGHT(h, weights, other, **options)


def edge_left_out(h, weights, alpha, **options):
    kept = torch.ones(9, 1)
    kept[3] = 0
    return RIGHT(h, weights, alpha * kept, **options)


def gradient_of_h_lost(h, weights, alpha, **options):
    return RIGHT(h.detach(), weights, alpha, **options) + h - h.detach()


def gradient_of_weights_lost(h, weights, alpha, **options):
    return RIGHT(h, weights._replace(conv5=weights.conv5.detach()), alpha, **options)


def gradient_where_none_belongs(h, weights, alpha, **options):
    return RIGHT(h, weights, alpha, **options) + 1e-7 * weights.linear.sum()


VALUES = [output_off, idle, acausal, another_operation, edge_left_out]
GRADIENTS = [gradient_of_h_lost, gradient_of_weights_lost, gradient_where_none_belongs]


def spoil_cells(monkeypatch, spoil):
    """Let every cell of this library, but not the unfused one, run `spoil` in place of `search_cell`."""
    monkeypatch.setattr(importlib.import_module("tarp_kernels.nn.search_cell"), "search_cell", spoil)

    def beside(_, *arguments, **options):
        return spoil(*arguments, **options)

    monkeypatch.setattr(cell_beside, "search_cell_with_layouts", beside)
