"""Tasks with closed forms: a model that is one vector w, and the loss ½ Σ c (w - a)² of an example a."""

from typing import Any

import torch
from torch import nn

from mltd import Example, Kind, Task
from mltd.kinds import Batch

CURVATURE = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))


class Quadratic(Kind):
    name = "quadratic"

    def check(self, where: str, example: Any) -> None:
        assert len(example.input_ids) == len(CURVATURE), where

    def check_model(self, model: Any) -> None:
        assert isinstance(model, Vector)

    def check_fits(self, where: str, example: Any, model: Any) -> None:
        pass

    def collate(self, examples: Any) -> Batch:
        points = torch.tensor([example.input_ids for example in examples], dtype=torch.float64)
        return Batch({"points": points}, torch.arange(len(examples)), points)

    def losses(self, model: Any, inputs: Any, positions: Any, targets: Any) -> torch.Tensor:
        return (0.5 * CURVATURE * (model.w - inputs["points"]) ** 2).sum(-1)


def quadratic_tasks(count: int = 3) -> list[Task]:
    draw = torch.Generator().manual_seed(4)
    points = torch.randn(count, 4, 3, generator=draw, dtype=torch.float64)

    def examples(some: torch.Tensor) -> list[Example]:
        return [Example(tuple(point.tolist()), ()) for point in some]

    return [Task(f"q{i}", examples(own[:2]), examples(own[2:]), Quadratic()) for i, own in enumerate(points)]


def means(tasks: list[Task]) -> tuple[torch.Tensor, torch.Tensor]:
    """[tasks, 3] the mean support point and the mean query point of each task: what its losses are parabolas about."""

    def mean(examples: Any) -> torch.Tensor:
        return torch.tensor([example.input_ids for example in examples], dtype=torch.float64).mean(0)

    supports, queries = zip(*((mean(task.support), mean(task.query)) for task in tasks), strict=True)
    return torch.stack(supports), torch.stack(queries)
