"""The controller: from a task's support set to the architecture of its search cells (method.md §3).

    E = masked mean of what the support set's tokens are embedded as       [d]
    logits = Linear(relu(Linear(E)))                                       [9, operations]
    alpha = one-hot forward, softmax backward, with Gumbel noise in meta-training

Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), section 3.3.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mltd.learner import mode
from mltd.tasks import Task
from tarp_kernels import disable_tarp
from tarp_kernels.models import is_adapted
from tarp_kernels.models_cells import search_cells
from tarp_kernels.ops.search_cell import OPERATIONS

EDGES = 9


class Controller(nn.Module):
    """Linear(d, hidden), relu, Linear(hidden, 9 · operations): logits of an architecture from a task embedding.

    hidden_size  d of the task embedding
    operations   names of the cell's candidates
    layers       None: one architecture for all cells; a number: one for each of so many cells
    """

    def __init__(
        self,
        hidden_size: int,
        operations: Sequence[str] = OPERATIONS,
        layers: int | None = None,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.hidden_size, self.operations, self.layers = hidden_size, tuple(operations), layers
        self.reduce = nn.Linear(hidden_size, hidden)
        self.choose = nn.Linear(hidden, (layers or 1) * EDGES * len(self.operations))

    @classmethod
    def for_model(cls, model: Any, hidden: int = 128) -> "Controller":
        """A controller that fits the search cells of this model."""
        cells = search_cells(model)
        first = next(iter(cells.values()))
        layers = len(cells) if first.config.per_layer else None
        return cls(_embedding_size(model), first.operations, layers, hidden)

    def form(self) -> dict[str, Any]:
        """The arguments that make a controller of this form, as JSON."""
        hidden = self.reduce.out_features
        return {
            "hidden_size": self.hidden_size,
            "operations": list(self.operations),
            "layers": self.layers,
            "hidden": hidden,
        }

    def check_fits(self, model: Any) -> None:
        """Raise ValueError that names what differs between this controller and the model's search cells."""
        fitting = Controller.for_model(model)
        for name in ("hidden_size", "operations", "layers"):
            own, expected = getattr(self, name), getattr(fitting, name)
            if own != expected:
                raise ValueError(
                    f"controller: has {name}={own!r}, expected {expected!r} for the search cells of this model; "
                    "use Controller.for_model(model)"
                )

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding [d] or [tasks, d] -> logits [9, operations] or [tasks, 9, operations].

        With `layers` that comes first, [layers, ..., 9, operations], as `tarp_kernels.architecture` takes it.
        """
        if embedding.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"embedding: got shape {list(embedding.shape)}, expected [..., {self.hidden_size}]")
        logits = self.choose(torch.relu(self.reduce(embedding.to(self.reduce.weight.dtype))))
        logits = logits.unflatten(-1, (self.layers or 1, EDGES, len(self.operations)))
        return logits.squeeze(-3) if self.layers is None else logits.movedim(-3, 0)


def _embedding_size(model: Any) -> int:
    """d of `task_embedding`; ELECTRA's embeddings are narrower than its layers."""
    if getattr(model.config, "is_encoder_decoder", False):
        return int(model.config.hidden_size)
    return int(model.get_input_embeddings().weight.shape[1])


# --- the task embedding -----------------------------------------------------------------------------------------------


@torch.no_grad()
def task_embedding(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean over all tokens of some examples, padding excluded, of the base model's representation: [d], float32.

    That is the output of the token-embedding layer, or of the encoder where there is one. Every token counts the same;
    adapters and cells are switched off, dropout too, and no gradient flows.

    input_ids, attention_mask  [examples, tokens]; attention_mask is 0 for padding; ValueError for no token at all
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        came = f"{list(mask.shape)}, expected {list(input_ids.shape)} like input_ids"
        raise ValueError(f"attention_mask: got shape {came}; pass the tokenizer's mask")
    if not bool(mask.any()):
        raise ValueError("attention_mask: got padding alone, expected at least one token")
    if getattr(model.config, "is_encoder_decoder", False):
        with mode(model, False), disable_tarp(model) if is_adapted(model) else contextlib.nullcontext():
            states = model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
    else:
        states = model.get_input_embeddings()(input_ids)
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    return states[mask != 0].to(wide).mean(0)


def support_embeddings(model: Any, tasks: Iterable[Task]) -> Tensor:
    """`task_embedding` of each task's support set: [tasks, d]."""
    device = model.get_input_embeddings().weight.device
    found = []
    for task in tasks:
        read = task.kind.inputs(task.support)
        found.append(task_embedding(model, read["input_ids"].to(device), read["attention_mask"].to(device)))
    return torch.stack(found)


# --- from logits to an architecture -----------------------------------------------------------------------------------


def straight_through(
    logits: Tensor, temperature: float = 1.0, *, gumbel: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """One-hot rows whose gradient is that of softmax((logits + noise) / temperature).

    gumbel     True: Gumbel noise, so rows are samples of softmax(logits); False: the argmax of the logits
    generator  draws the noise; None: torch's own

    The forward values are exactly 0 and 1, which masked execution needs: `torch.nn.functional.gumbel_softmax` is off by
    a rounding. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected more than 0")
    if gumbel:
        logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
    soft = (logits / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def chosen(controller: Controller, model: Any, tasks: Sequence[Task]) -> Tensor:
    """The architecture of each task for good: the argmax of the logits, exactly one-hot, without gradient.

    [tasks, 9, operations], or [cells, tasks, 9, operations] for a controller with `layers`.
    """
    with torch.no_grad():
        return straight_through(controller(support_embeddings(model, tasks)), gumbel=False)


def sampled(
    controller: Controller, model: Any, tasks: Sequence[Task], temperature: float, gumbel: bool, seed: str
) -> tuple[Tensor, Tensor]:
    """Each task's architecture in meta-training, shaped as `chosen` has it, and the logits; both differentiable.

    A task's noise depends on `seed` and its name alone, not on the tasks beside it: several processes that share the
    tasks draw what one would.
    """
    logits = controller(support_embeddings(model, tasks))
    if gumbel:
        shape = [logits.shape[0], *logits.shape[2:]] if controller.layers is not None else list(logits.shape[1:])
        draws = [_gumbel(shape, f"{seed}/{task.name}") for task in tasks]
        noise = torch.stack(draws, dim=-3).to(logits.device, logits.dtype)
        return straight_through(logits + noise, temperature, gumbel=False), logits
    return straight_through(logits, temperature, gumbel=False), logits


def _gumbel(shape: Sequence[int], seed: str) -> Tensor:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(number)
    return -torch.empty(shape).exponential_(generator=generator).log()


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the rows' softmax: a scalar from 0 to log(operations).

    `loss - weight * entropy(logits)` keeps a controller from settling on operations before it has tried the others.
    """
    logarithms = logits.log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1).mean()


@dataclass(frozen=True)
class Temperature:
    """A temperature that falls exponentially from `start` to `end` within `steps` outer steps, and stays there."""

    start: float = 1.0
    end: float = 0.1
    steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")

    def at(self, step: int) -> float:
        """The temperature of outer step 0, 1, …"""
        return self.start * (self.end / self.start) ** (min(step, self.steps) / self.steps)
