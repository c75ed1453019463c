"""What of a model the inner loop adapts, and how a batch runs with every task's own values of it.

Parts of a model, by name:

    adapter    all that `apply_tarp` trains; tarp, cells and layernorm are its parts
    lora       PEFT's LoRA
    base       the pretrained weights
    all        everything
    another    a regular expression that matches whole parameter names

Where the adapter alone is adapted, tasks run side by side, and the base model exists once. Anything else runs task by
task, the task's values in the place of the model's own.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mltd.frozen_norms import frozen_norms
from mltd.tasks import Task
from tarp_kernels import architecture, tarp_parameters, task_parallel
from tarp_kernels.models import is_adapted
from tarp_kernels.nn.linear import TarpLayer
from tarp_kernels.nn.task_parallel import Offsets

PARTS = ("adapter", "tarp", "cells", "layernorm", "lora", "base", "all")


def choose(model: nn.Module, parts: Sequence[str], argument: str = "parts") -> dict[str, nn.Parameter]:
    """{name: parameter} of these parts, in the order of the model.

    Raises ValueError for a part that this model does not have; `argument` is what the message calls `parts`.
    """
    if isinstance(parts, str):
        raise ValueError(f"{argument}: got {parts!r}, expected several names; write ({parts!r},)")
    own = dict(model.named_parameters())
    wanted: set[str] = set()
    for part in parts:
        found = _part(model, part, own, argument)
        if not found:
            fixes = {
                "adapter": "call apply_tarp(model, config) first",
                "tarp": "call apply_tarp(model, config) first",
                "cells": "give TarpConfig a search_cell",
                "layernorm": "set TarpConfig.train_layernorm",
                "lora": "inject PEFT's LoRA first",
            }
            fix = fixes.get(part, f"use {', '.join(PARTS)}, or a pattern that matches whole parameter names")
            what = "has no adapter" if part == "adapter" else f"has no parameter of {part!r}"
            raise ValueError(f"{argument}: the model {what}; {fix}")
        wanted |= found
    return {name: parameter for name, parameter in own.items() if name in wanted}


def _part(model: nn.Module, part: str, own: Mapping[str, nn.Parameter], argument: str) -> set[str]:
    adapter = set(tarp_parameters(model)) if is_adapted(model) else set()
    lora = {name for name in own if "lora_" in name}
    if part in ("all", "lora", "adapter", "base"):
        return {"all": set(own), "lora": lora, "adapter": adapter, "base": set(own) - adapter - lora}[part]
    if part in ("tarp", "cells", "layernorm"):
        cells = {name for name in adapter if ".search_cell." in name}
        tarp = {name for name in adapter if isinstance(model.get_submodule(name.rpartition(".")[0]), TarpLayer)}
        return {"tarp": tarp, "cells": cells, "layernorm": adapter - cells - tarp}[part]
    try:
        return {name for name in own if re.fullmatch(part, name)}
    except re.error as error:
        raise ValueError(f"{argument}: got {part!r}, which is no part and no regular expression ({error})") from None


class Learner:
    """A model and the parts of it that the inner loop adapts.

    shared    {name: parameter} that each task adapts from
    parallel  whether tasks run side by side
    """

    def __init__(self, model: Any, adapts: Sequence[str]) -> None:
        self.model = model
        self.shared = choose(model, adapts, "adapts")
        self.parallel = set(self.shared) <= set(tarp_parameters(model) if is_adapted(model) else {})
        self.device = next(model.parameters()).device

    def groups(self, tasks: Sequence[Task], at_once: int | None = None) -> list[Sequence[Task]]:
        """The tasks as they run: all side by side, or `at_once` of them, or one by one."""
        size = 1 if not self.parallel else len(tasks) if at_once is None else at_once
        return [tasks[first : first + size] for first in range(0, len(tasks), max(1, size))]

    def start(self, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The values to adapt from: these, or the model's own. ValueError for other names and shapes."""
        given = self.shared if parameters is None else parameters
        if set(given) != set(self.shared):
            wrong = sorted(set(given) ^ set(self.shared))[0]
            raise ValueError(f"parameters: {wrong!r} is not in both, expected exactly the names that are adapted")
        for name, tensor in given.items():
            if tensor.shape != self.shared[name].shape:
                raise ValueError(
                    f"parameters[{name!r}]: got shape {list(tensor.shape)}, expected "
                    f"{list(self.shared[name].shape)}, a start shared by all tasks"
                )
        return {name: given[name] for name in self.shared}

    def running(
        self, stacked: Mapping[str, Tensor], offsets: Offsets, alpha: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """`running` of this model."""
        return running(self.model, stacked, offsets, alpha)


@contextlib.contextmanager
def running(model: Any, stacked: Mapping[str, Tensor], offsets: Offsets, alpha: Tensor | None = None) -> Iterator[None]:
    """Within the block examples offsets[i]:offsets[i+1] of a batch are task i's, by its own values of the parameters.

    stacked  name -> [B, *shape]; other parameters are the model's own. One task only where names of the base model are
             among them
    alpha    the architecture of each task's cells, see `tarp_kernels.architecture`; None: the cells' own

    Gradients flow to `stacked` and alpha. Keep the block open until after backward: recomputation under activation
    checkpointing needs it.
    """
    tasks = offsets.tasks
    adapter = tarp_parameters(model) if is_adapted(model) else {}
    with contextlib.ExitStack() as inside:
        if not set(stacked) <= set(adapter):
            if tasks != 1:
                raise ValueError(f"tasks: got {tasks} at once, expected one: the base model is adapted, not shared")
            inside.enter_context(_swapped(model, {name: value[0] for name, value in stacked.items()}))
            alpha = None if alpha is None else alpha.squeeze(-3)
        elif stacked or alpha is not None:
            rest = {name: value for name, value in adapter.items() if name not in stacked}
            spread = {name: value.expand(tasks, *value.shape) for name, value in rest.items()}
            inside.enter_context(task_parallel(model, {**spread, **stacked}, offsets))
        if alpha is not None:
            inside.enter_context(architecture(model, alpha))
        if torch.is_grad_enabled():
            inside.enter_context(frozen_norms(model))
        yield


@contextlib.contextmanager
def _swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block these tensors stand in the place of the model's parameters, wherever it ties them."""
    own = dict(model.named_parameters())
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module._parameters, leaf))
    try:
        for name, value in values.items():
            for table, leaf in places[id(own[name])]:
                table[leaf] = value
        yield
    finally:
        for name in values:
            for table, leaf in places[id(own[name])]:
                table[leaf] = own[name]


@contextlib.contextmanager
def requiring(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within the block these ask for gradients; afterwards as before."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, asked in zip(parameters, before, strict=True):
            parameter.requires_grad_(asked)


def refuse_reentrant(model: nn.Module) -> None:
    """Raise ValueError for re-entrant activation checkpointing: blocks whose input is frozen get no gradients there."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        on = getattr(module, "gradient_checkpointing", False) and checkpoint is not None
        if on and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "model: its activation checkpointing is re-entrant, which loses the gradients of blocks whose input is "
                "frozen; call model.gradient_checkpointing_enable({'use_reentrant': False})"
            )


@contextlib.contextmanager
def mode(model: Any, train: bool) -> Iterator[None]:
    """The whole model in training or evaluation mode, and every module as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def installed(model: Any, parameters: Mapping[str, Tensor], task: int | None = None) -> Iterator[None]:
    """Within the block the model's own parameters hold these values (of that task, when stacked), as for `generate`."""
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in parameters}
    try:
        with torch.no_grad():
            for name, value in parameters.items():
                own[name].copy_(value if task is None else value[task])
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)
