"""Inner steps as one CUDA graph: Python launches the first, records the second, and the GPU runs the others by itself.

A step reads no value on the host and copies nothing from it, so what the second step launches is what every later one
would: all inputs lie where they lay, parameters and the optimiser's moments move in place, and the learning rate is a
number on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mltd.learner import Learner
from mltd.packing import Packed
from mltd.sharded import is_sharded
from tarp_kernels.nn.cell_beside import CellBeside
from tarp_kernels.nn.linear import TarpLayer
from tarp_kernels.ops import constants

DEVICES = ("cuda",)
Replay = Callable[[], None]


class CapturedStep:
    """Calls `step`, which takes an inner step and returns its losses [B], as often as it is called itself.

    packed  what the steps read; kept as long as the graph, which does not own it
    """

    def __init__(self, step: Callable[[], Tensor], packed: Packed, device: torch.device) -> None:
        self.step, self.packed, self.calls = step, packed, 0
        self.stream = side_stream(device)
        self.recorded: tuple[Replay, Tensor] | None = None
        self.kept: list[Any] = []

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls == 1:  # compiles kernels, makes tables and the optimiser's state
            return run_beside(self.stream, self.step)
        if self.recorded is None:
            self.recorded = record(self.stream, self.step)
            self.kept = [*constants.held()]
            for one in self.packed.passes:
                self.kept += one.offsets.layouts.held()
        replay, losses = self.recorded
        replay()
        return losses.clone()  # the next replay writes over them


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nothing else runs on: the default one cannot be captured."""
    return torch.cuda.Stream(device)


# The current device need not be the model's, and streams are looked up there.


def run_beside(stream: torch.cuda.Stream, step: Callable[[], Tensor]) -> Tensor:
    """The step on `stream`, after all that the current stream has to do and before what it gets next."""
    with torch.cuda.device(stream.device):
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            losses = step()
        current.wait_stream(stream)
    return losses


def record(stream: torch.cuda.Stream, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """What starts the step again, and the losses that it leaves: nothing has run yet."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(stream.device), torch.cuda.graph(graph, stream=stream):
            losses = step()
    except RuntimeError as error:
        raise RuntimeError(f"cuda_graph: this model's inner step cannot be captured ({error}); leave it out") from error

    def replay() -> None:
        with torch.cuda.device(stream.device):
            graph.replay()

    return replay, losses


def require_capturable(learner: Learner, train_mode: bool) -> None:
    """Raise ValueError, with the fix, for a model whose steps cannot be captured."""
    if learner.device.type not in DEVICES:
        raise ValueError(f"cuda_graph: the model lies on {learner.device}, expected a CUDA device; leave it out")
    modules = list(learner.model.modules())
    devices = {str(parameter.device) for parameter in learner.model.parameters()}
    whats = {
        "the model is spread over several devices": len(devices) > 1,
        "the model is sharded, and its processes would wait for each other inside the graph": any(
            is_sharded(parameter) for parameter in learner.model.parameters()
        ),
        "search cells read the padding of a batch at each call where the base model is adapted": (
            not learner.parallel and any(isinstance(module, CellBeside) for module in modules)
        ),
        "activation checkpointing reads the state of the random generator": train_mode
        and any(getattr(module, "gradient_checkpointing", False) for module in modules),
        "TarpConfig.dropout draws its seed on the host, so that every replay would drop the same": train_mode
        and any(isinstance(module, TarpLayer) and module.config.dropout > 0 for module in modules),
    }
    for what, found in whats.items():
        if found:
            raise ValueError(f"cuda_graph: {what}, which a graph cannot hold; leave cuda_graph out")


def host_architecture(learner: Learner, alpha: Tensor | None) -> Tensor | None:
    """The tasks' architectures on the CPU, where cells read them at each call; None for a model without cells.

    Where `alpha` is None those of an `architecture` block around, or else the cells' own.
    """
    if alpha is None:
        cells: Sequence[CellBeside] = [m for m in learner.model.modules() if isinstance(m, CellBeside)]
        if not cells:
            return None
        per_layer, alpha = cells[0].config.per_layer, cells[0].calls.alpha
        if alpha is None:
            alpha = torch.stack([cell.alpha for cell in cells]) if per_layer else cells[0].alpha
        if not learner.parallel and alpha.dim() == 2 + per_layer:
            alpha = alpha.unsqueeze(-3)
    return alpha.detach().cpu()
