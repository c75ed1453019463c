"""One adapted layer beside the frozen nn.Linear that it wraps: forward, forward + backward, and a few rows (decode)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mltd.bench.cases import Case, GateError
from mltd.bench.contenders import Cached, deviation, layer_contenders

SHAPES = ("512x768x768x8", "2048x768x2304x8", "512x1024x4096x8", "4096x576x1536x16", "1024x1024x1024x32")
DECODE_SHAPES = ("1x1024x1024x8", "16x1024x1024x8")


def layer_cases(
    shapes: Sequence[str] = SHAPES,
    decode_shapes: Sequence[str] = DECODE_SHAPES,
    rounds: int = 25,
    kinds: Sequence[str] = ("forward", "forward+backward"),
) -> Iterator[Case]:
    """Cases one after the other, each built only when it is asked for.

    Shapes read "rows x in_features x out_features x rank", for example "512x768x3072x8"; ValueError for any other.
    """
    for kind in kinds:
        for shape in shapes:
            yield layer_case(kind, shape, rounds)
    for shape in decode_shapes:
        yield layer_case("decode", shape, rounds * 20)


def layer_case(kind: str, shape: str, rounds: int) -> Case:
    """One case of a kind: "forward" | "forward+backward" | "decode", a forward pass of few rows | "multiplicative", a
    forward pass with a static multiplicative term beside the dynamic additive one | "multiplicative cached", the same
    inside `cached_factors`.
    """
    modules, x, dy = layer_setup(shape, **({"multiplicative": "static"} if "multiplicative" in kind else {}))
    if kind == "forward+backward":
        x.requires_grad_()
        calls = {name: training(module, x, dy) for name, module in modules.items()}
        return Case(kind, shape, calls, _training_gate(modules, x, dy), "linear", rounds)
    if kind == "multiplicative cached":
        modules["tarp"] = Cached(modules["tarp"])
    calls = {name: inference(module, x) for name, module in modules.items()}
    return Case(kind, shape, calls, _inference_gate(modules, x), "linear", rounds)


def layer_setup(shape: str, **config: str) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The contenders of one shape, an input x [rows, in_features] and a gradient dy [rows, out_features]."""
    rows, in_features, out_features, rank = parse_shape(shape)
    modules = layer_contenders(in_features, out_features, rank, **config)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, in_features, generator=generator)
    return modules, x, torch.randn(rows, out_features, generator=generator)


def parse_shape(shape: str) -> tuple[int, int, int, int]:
    """rows, in_features, out_features and rank of a shape such as "512x768x3072x8"."""
    parts = shape.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"shape: got {shape!r}, expected four positive numbers, rows x in_features x out_features x rank, "
            "for example 512x768x3072x8"
        )
    rows, in_features, out_features, rank = map(int, parts)
    return rows, in_features, out_features, rank


def inference(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass without gradients; returns y."""

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def training(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """A forward and a backward pass, gradients made anew each time; returns y."""
    parameters = list(module.parameters())

    def call() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        x.grad = None
        y = module(x)
        y.backward(dy)
        return y

    return call


def _inference_gate(modules: dict[str, nn.Module], x: Tensor) -> Callable[[], float]:
    def gate() -> float:
        with torch.no_grad():
            y = {name: module(x) for name, module in modules.items()}
        worst = deviation(y["tarp"], y["unfused"], y["linear"], "output of TarpLinear against unfused PyTorch")
        if "peft_lora" in y and torch.equal(y["peft_lora"], y["linear"]):
            raise GateError("PEFT's LoRA adds nothing to the output")
        if isinstance(modules["tarp"], Cached) and not modules["tarp"].keeps_something:
            raise GateError("TarpLinear keeps no product of its factor and its weight")
        return worst

    return gate


def _training_gate(modules: dict[str, nn.Module], x: Tensor, dy: Tensor) -> Callable[[], float]:
    def gate() -> float:
        outputs: dict[str, Tensor] = {}
        gradients: dict[str, dict[str, Any]] = {}
        for name, module in modules.items():
            outputs[name] = training(module, x, dy)().detach()
            gradients[name] = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
            gradients[name]["x"] = x.grad
        tarp, plain = gradients["tarp"], gradients["unfused"]
        if set(tarp) != set(plain):
            raise GateError(f"gradients of TarpLinear: {sorted(tarp)}, of unfused PyTorch: {sorted(plain)}")
        worst = deviation(outputs["tarp"], outputs["unfused"], outputs["linear"], "output of TarpLinear")
        for name, expected in plain.items():
            without = gradients["linear"]["x"] if name == "x" else torch.zeros_like(expected)
            worst = max(worst, deviation(tarp[name], expected, without, f"gradient of {name} of TarpLinear"))
        return worst

    return gate
