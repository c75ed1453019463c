"""A search cell under masked execution beside what a reader of the paper would run: all six operations, then a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mltd.bench.cases import Case, GateError
from mltd.bench.contenders import deviation, stir
from tarp_kernels import SearchCell
from tarp_kernels.ops.search_cell import OPERATIONS

# The dominant cell that the paper publishes for language modelling, in the order of the edges (method.md §3).
DOMINANT = ("conv5", "conv5", "none", "conv5", "identity", "conv3", "conv5", "identity", "identity")
INPUTS = ((0, 1), (0, 1, 2), (0, 1, 2, 3))  # of n0, n1, n2 among s0, s1, n0, n1
KINDS = ("search cell", "search cell forward+backward")


def architecture(names: tuple[str, ...] = DOMINANT) -> Tensor:
    """alpha [9, 6] that selects one operation by name for each edge."""
    return F.one_hot(torch.tensor([OPERATIONS.index(name) for name in names]), len(OPERATIONS)).float()


class UnfusedCell(SearchCell):
    """SearchCell in plain PyTorch: one call per symbol, torch's own convolutions, over the same parameters.

    skipping  False: every operation of every edge runs, as in the paper's code; True: those with alpha = 0 do not
    """

    def __init__(self, cell: SearchCell, skipping: bool):
        super().__init__(cell.hidden_size, cell.width, cell.stem, cell.causal)
        self.skipping = skipping
        self.load_state_dict(cell.state_dict())

    def forward(self, h, alpha, attention_mask=None, segments=None):
        if attention_mask is not None or segments is not None or self.stem != "identity":
            raise ValueError("unfused: knows whole sequences of one task and stem='identity' only")
        pairs = zip(self.project, self.project_bias, strict=True)
        nodes = [torch.relu(F.linear(h, *pair)) for pair in pairs]
        values, edge = alpha.tolist(), 0
        for inputs in INPUTS:
            terms = []
            for i in inputs:
                for m, name in enumerate(OPERATIONS):
                    if not self.skipping or values[edge][m] != 0:
                        terms.append(alpha[edge, m] * self.operate(name, edge, nodes[i]))
                edge += 1
            nodes.append(sum(terms))
        return h + F.linear((nodes[2] + nodes[3] + nodes[4]) / 3, self.output, self.output_bias)

    def operate(self, name: str, edge: int, x: Tensor) -> Tensor:
        """One operation of one edge: x [B, S, C] -> [B, S, C]."""
        if name == "none":
            return torch.zeros_like(x)
        if name == "identity":
            return x
        weight, bias = getattr(self, name)[edge], getattr(self, f"{name}_bias")[edge]
        if name == "linear":
            return torch.relu(F.linear(x, weight, bias))
        if name == "glu":
            return F.linear(x, weight[0], bias[0]) * torch.sigmoid(F.linear(x, weight[1], bias[1]))
        taps = len(weight)
        left = taps - 1 if self.causal else taps // 2
        padded = F.pad(x.transpose(1, 2), (left, taps - 1 - left))
        return torch.relu(F.conv1d(padded, weight.permute(1, 2, 0), bias)).transpose(1, 2)


def cell_cases(rounds: int = 25, kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    """The published dominant cell at d = 768, C = 64 on 8 x 256 tokens: forward, then forward and backward."""
    for kind in kinds:
        yield cell_case(kind, rounds=rounds)


def cell_case(kind: str, batch: int = 8, length: int = 256, d: int = 768, width: int = 64, rounds: int = 25) -> Case:
    """Masked execution of the dominant cell beside plain PyTorch, with all operations and with the selected ones."""
    cell = SearchCell(d, width, stem="identity")
    stir(cell)
    modules: dict[str, nn.Module] = {
        "mixture": UnfusedCell(cell, skipping=False),
        "skipping": UnfusedCell(cell, skipping=True),
        "masked": cell,
    }
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(batch, length, d, generator=generator)
    dout = torch.randn(batch, length, d, generator=generator)
    alpha, training = architecture(), kind == KINDS[1]
    h.requires_grad_(training)

    def run(module: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            if not training:
                with torch.no_grad():
                    return module(h, alpha)
            for tensor in (h, *module.parameters()):
                tensor.grad = None
            out = module(h, alpha)
            out.backward(dout)
            return out

        return call

    calls = {name: run(module) for name, module in modules.items()}

    def gate() -> float:
        outputs, gradients = {}, {}
        for name, module in modules.items():
            outputs[name] = calls[name]().detach()
            gradients[name] = {key: p.grad for key, p in module.named_parameters()} | {"h": h.grad}
        worst = 0.0
        for name in ("skipping", "masked"):
            worst = max(worst, deviation(outputs[name], outputs["mixture"], h.detach(), f"output, {name}"))
            for key, expected in gradients["mixture"].items():
                got = gradients[name][key]
                if not training or expected is None or not bool(expected.any()):
                    if got is not None and bool(got.any()):
                        raise GateError(f"gradient of {key}, {name}: got one where the mixture has none")
                    continue
                without = dout if key == "h" else torch.zeros_like(expected)
                worst = max(worst, deviation(got, expected, without, f"gradient of {key}, {name}"))
        return worst

    return Case(kind, f"{batch}x{length} tokens, d={d}, C={width}", calls, gate, "mixture", rounds)
