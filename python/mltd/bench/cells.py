"""A search cell under masked execution beside what a reader of the paper would run: all six operations, then a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mltd.bench.cases import Case, GateError
from mltd.bench.contenders import deviation, stir_cells
from mltd.bench.unfused_cell import UnfusedCell
from tarp_kernels import SearchCell
from tarp_kernels.ops.search_cell import OPERATIONS

# The dominant cell that the paper publishes for language modelling, in the order of the edges (method.md §3).
DOMINANT = ("conv5", "conv5", "none", "conv5", "identity", "conv3", "conv5", "identity", "identity")
KINDS = ("search cell", "search cell forward+backward")


def architecture(names: tuple[str, ...] = DOMINANT) -> Tensor:
    """alpha [9, 6] that selects one operation by name for each edge."""
    return F.one_hot(torch.tensor([OPERATIONS.index(name) for name in names]), len(OPERATIONS)).float()


def cell_cases(rounds: int = 25, kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    """The published dominant cell at d = 768, C = 64 on 8 x 256 tokens: forward, then forward and backward."""
    for kind in kinds:
        yield cell_case(kind, rounds=rounds)


def cell_case(kind: str, batch: int = 8, length: int = 256, d: int = 768, width: int = 64, rounds: int = 25) -> Case:
    """Masked execution of the dominant cell beside plain PyTorch, with all operations and with the selected ones."""
    cell = SearchCell(d, width, stem="identity")
    stir_cells(cell)
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
                if got is None:
                    raise GateError(f"gradient of {key}, {name}: got none where the mixture has one")
                without = dout if key == "h" else torch.zeros_like(expected)
                worst = max(worst, deviation(got, expected, without, f"gradient of {key}, {name}"))
        return worst

    return Case(kind, f"{batch}x{length} tokens, d={d}, C={width}", calls, gate, "mixture", rounds)
