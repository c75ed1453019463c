"""What the outer loop trains, and its optimiser: parameters of the model, inner learning rates, a controller."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mltd.controller import Controller
from mltd.inner_loop import OPTIMIZERS, DivergedError, set_rate, take_step
from mltd.learner import Learner, choose
from mltd.meta_config import MetaConfig
from mltd.meta_gradient import rate_name
from mltd.sharded import is_sharded, placed, whole


class OuterState:
    """All that is trained, by name, and the outer optimiser over it.

    rates          inner learning rates by the names of the adapted parameters; None where they are not learned
    of_model       trained parameters by their names in the model, and rates as "rates/<name>"
    of_controller  as "controller/<name>"
    """

    def __init__(self, learner: Learner, config: MetaConfig, controller: Controller | None) -> None:
        self.config = config
        parts = [part for part in config.trains if part != "controller"]
        self.of_model: dict[str, Tensor] = dict(choose(learner.model, parts, "trains"))
        self.rates: dict[str, Tensor] | None = None
        if config.learn_rates:
            self.rates = {
                name: torch.full_like(value, config.inner.lr, requires_grad=True)
                for name, value in learner.shared.items()
            }
            self.of_model |= {rate_name(name): rate for name, rate in self.rates.items()}
        self.of_controller: dict[str, Tensor] = {}
        if "controller" in config.trains and controller is not None:
            self.of_controller = {f"controller/{name}": value for name, value in controller.named_parameters()}
        self.all: dict[str, Tensor] = {**self.of_model, **self.of_controller}
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        rates = {} if self.rates is None else {rate_name(name): rate for name, rate in self.rates.items()}
        weights = [value for name, value in self.of_model.items() if name not in rates]
        decay = config.outer_weight_decay
        plain = [value for value in weights if not is_sharded(value)]
        sharded = [value for value in weights if is_sharded(value)]
        groups = [
            {"params": plain, "scale": 1.0, "weight_decay": decay},
            # torch's fused kernels take no mixture, and its SGD nothing sharded
            {"params": sharded, "scale": 1.0, "weight_decay": decay, "fused": False},
            {"params": list(rates.values()), "scale": _scale(config, config.rates_lr), "weight_decay": 0.0},
            {
                "params": list(self.of_controller.values()),
                "scale": _scale(config, config.controller_lr),
                "weight_decay": decay,
            },
        ]
        kind = OPTIMIZERS[config.outer_optimizer]
        return kind([group for group in groups if group["params"]], lr=config.outer_lr, fused=True)

    def descend(self, gradients: Mapping[str, Tensor], iteration: int) -> tuple[float, float]:
        """One outer step, of iteration 1, 2, …; returns the gradient's norm and the learning rate.

        Raises DivergedError, and moves nothing, for a gradient that is not finite, as second order can have behind
        losses that are.
        """
        ordered = [gradients[name] for name in self.all]
        norms = torch.stack([whole(gradient.norm()) for gradient in ordered])
        norm = norms.norm().item()
        if not math.isfinite(norm):
            name = next(name for name, one in zip(self.all, norms.tolist(), strict=True) if not math.isfinite(one))
            raise DivergedError(f"the outer gradient for {name!r} is not finite; lower the inner learning rate")
        if self.config.outer_clip is not None:
            factor = min(1.0, self.config.outer_clip / (norm + 1e-6))  # 1e-6 as in torch's clip_grad_norm_
            ordered = [gradient * factor for gradient in ordered]
        lr = self.config.outer_lr_at(iteration)
        set_rate(self.optimizer, lr)
        take_step(self.optimizer, list(self.all.values()), ordered)
        return norm, lr

    def copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.all.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        for name, own in self.all.items():
            own.copy_(placed(values[name], own))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, and nothing sharded, under names that a checkpoint can hold."""
        found = {f"parameters/{name}": whole(value) for name, value in self.all.items()}
        for name, value in self.all.items():
            for key, state in self.optimizer.state.get(value, {}).items():
                if state is not None:  # SGD without momentum keeps a None
                    found[f"optimizer/{name}/{key}"] = whole(state)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave; other names are left alone."""
        self.put({name: tensors[f"parameters/{name}"] for name in self.all})
        for name, value in self.all.items():
            prefix = f"optimizer/{name}/"
            mine = {key[len(prefix) :]: state for key, state in tensors.items() if key.startswith(prefix)}
            # Adam's count of steps stays where the optimiser keeps it, the moments beside the parameter
            states = {key: state.clone() if state.dim() == 0 else placed(state, value) for key, state in mine.items()}
            if states:
                self.optimizer.state[value] = states


def _scale(config: MetaConfig, lr: float | None) -> float:
    return 1.0 if lr is None else lr / config.outer_lr
