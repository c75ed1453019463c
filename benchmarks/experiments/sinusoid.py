"""Sinusoid regression, the first experiment of MAML: does the meta-learning loop reach the published error?

    python -m benchmarks.experiments.sinusoid          # writes benchmarks/experiments/results/sinusoid.json

A task is a sine curve of amplitude 0.1 to 5 and phase 0 to π, seen at 5 points of [-5, 5]; a network with two hidden
layers of 40 units takes one gradient step and is judged by its squared error at other points. Set-up: Finn, Abbeel,
Levine 2017 (arXiv:1703.03400), section 5.1. Errors to reach, trained and tested with 5 points: MAML 1.13 ± 0.18,
Meta-SGD 0.90 ± 0.16 (Li, Zhou, Chen, Li 2017, arXiv:1707.09835, table 1; quoted without a copy of it at hand).
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mltd import Example, InnerConfig, Kind, MetaConfig, MetaTrainer, Task, TaskSet
from mltd.inner_loop import task_losses, trajectory
from mltd.kinds import Batch
from mltd.learner import Learner
from mltd.machine import facts

PUBLISHED = {"MAML": (1.13, 0.18), "Meta-SGD": (0.90, 0.16)}
METHODS: dict[str, dict[str, Any]] = {
    "MAML": {"objective": "second_order"},
    "MAML, first order": {"objective": "first_order"},
    "Meta-SGD": {"objective": "second_order", "learn_rates": True},
    "joint training": {"objective": "multitask"},
}


class Network(nn.Module):
    """1 → 40 → 40 → 1 with relu; weights from N(0, 0.1²), as published."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.1)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Point(Kind):
    """An example is a point (x, y) of a curve; its loss is the squared error at x."""

    name = "point"

    def check(self, where: str, example: Any) -> None:
        if len(example.input_ids) != 1 or len(example.labels) != 1:
            raise ValueError(f"{where}: got {example}, expected one x and one y")

    def check_model(self, model: Any) -> None:
        if not isinstance(model, Network):
            raise ValueError(f"model: got {type(model).__name__}, expected a Network")

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        pass  # every point fits

    def collate(self, examples: Any) -> Batch:
        x, y = (torch.tensor([point[i] for point in examples]) for i in (0, 1))
        return Batch({"x": x}, torch.arange(len(examples)), y)

    def losses(self, model: Any, inputs: Any, positions: Tensor, targets: Tensor) -> Tensor:
        return (model(inputs["x"]) - targets).square().squeeze(-1)


def curves(count: int, seed: int, shots: int, query: int) -> TaskSet:
    """`count` sine curves, each at `shots` support points and `query` others."""
    draw, kind = random.Random(seed), Point()

    def task(index: int) -> Task:
        amplitude, phase = draw.uniform(0.1, 5), draw.uniform(0, math.pi)
        points = [(x, amplitude * math.sin(x - phase)) for x in (draw.uniform(-5, 5) for _ in range(shots + query))]
        examples = [Example((x,), (y,)) for x, y in points]
        return Task(f"curve-{seed}-{index}", examples[:shots], examples[shots:], kind)

    return TaskSet([task(index) for index in range(count)])


def train(method: str, iterations: int, seed: int) -> tuple[Network, MetaTrainer]:
    torch.manual_seed(seed)
    model = Network()
    config = MetaConfig(
        InnerConfig(steps=1, optimizer="sgd", lr=0.01, adapts=("all",)),
        iterations=iterations,
        tasks_per_batch=4,
        trains=("all",),
        seed=seed,
        **METHODS[method],
    )
    trainer = MetaTrainer(model, curves(4 * iterations, seed, shots=5, query=5), config)
    trainer.train()
    return model, trainer


def errors(model: Network, trainer: MetaTrainer, tasks: TaskSet) -> list[list[float]]:
    """[task][step] mean squared errors at the query points; learned rates are those of one step, others go on to 10."""
    learner, found = Learner(model, ("all",)), []
    steps = 10 if trainer.outer.rates is None else 1
    inner = InnerConfig(steps=steps, optimizer="sgd", lr=0.01, adapts=("all",))
    for task in tasks:
        query = trainer.problem.packed([task])
        walk = trajectory(learner, [task], inner, rates=trainer.outer.rates)
        found.append([task_losses(learner, query, reached.parameters).item() for reached in walk])
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval by the normal law: there are hundreds of curves."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), 1.96 * numbers.std().item() / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8_000, help="outer steps of 4 curves (published: 70,000)")
    parser.add_argument("--tests", type=int, default=600, help="curves to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sinusoid.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # products of 40 units: a second thread only waits
    unseen = curves(asked.tests, seed=10_000 + asked.seed, shots=5, query=100)
    results = {}
    for method in METHODS:
        by_task = errors(*train(method, asked.iterations, asked.seed), unseen)
        steps = [step for step in (0, 1, 5, 10) if step < len(by_task[0])]
        by_step = {step: interval([task[step] for task in by_task]) for step in steps}
        results[method] = {str(step): {"mse": mean, "half_interval_95": half} for step, (mean, half) in by_step.items()}
        mean, half = by_step[1]
        goal = f", published {PUBLISHED[method][0]} ± {PUBLISHED[method][1]}" if method in PUBLISHED else ""
        print(f"{method}: {mean:.2f} ± {half:.2f} after one step{goal}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"iterations": asked.iterations, "tests": asked.tests, "seed": asked.seed, "shots": 5}
    published = {name: {"mse": mean, "half_interval_95": half} for name, (mean, half) in PUBLISHED.items()}
    made = {"settings": settings, "published_after_1_step": published, "by_step": results, "machine": facts()}
    asked.out.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
