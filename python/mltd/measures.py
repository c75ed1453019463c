"""What is measured of adapted models beside their loss: texts that they write, and labels or numbers that they give.

A measure is called after an adaptation step with the model, some tasks, their adapted parameters and architectures,
and returns task name -> metric -> value. Answers meet their references by id, "task/query[i]".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mltd.classification import classify, label_scores
from mltd.generation import Decode, Decoding, generate
from mltd.kinds import Classification
from mltd.learner import mode, running
from mltd.query_batches import query_id, query_prompts
from mltd.tasks import Task
from tarp_kernels.nn.task_parallel import Offsets

Values = dict[str, dict[str, float]]
TEXT, LABEL = ("bleu", "rouge1", "rouge2", "rougeL"), ("accuracy", "matthews")


class Measure(Protocol):
    def __call__(
        self, model: Any, tasks: Sequence[Task], parameters: Mapping[str, Tensor], alpha: Tensor | None
    ) -> Values: ...


@dataclass(frozen=True)
class Written:
    """BLEU and ROUGE of what the model writes for every query example.

    decode      tokens -> text, such as a tokenizer's `decode`
    references  id -> the texts that are right
    """

    decode: Decode
    decoding: Decoding
    references: Mapping[str, str | Sequence[str]]
    metrics: Sequence[str] = TEXT

    def __call__(
        self, model: Any, tasks: Sequence[Task], parameters: Mapping[str, Tensor], alpha: Tensor | None
    ) -> Values:
        prompts = query_prompts(tasks)
        texts = generate(model, prompts, self.decode, self.decoding, parameters, alpha)
        return {
            task.name: text_metrics({key: texts[key] for key in own}, self.references, self.metrics)
            for task, own in zip(tasks, prompts, strict=True)
        }


@dataclass(frozen=True)
class Named:
    """Accuracy and Matthews of the label whose text a language model finds likeliest after the source.

    candidates  task name -> label -> the tokens of its text
    labels      id -> the right label
    """

    candidates: Mapping[str, Mapping[str, Sequence[int]]]
    labels: Mapping[str, str]
    metrics: Sequence[str] = LABEL

    def __call__(
        self, model: Any, tasks: Sequence[Task], parameters: Mapping[str, Tensor], alpha: Tensor | None
    ) -> Values:
        prompts = query_prompts(tasks)
        scores = label_scores(model, prompts, [self.candidates[task.name] for task in tasks], parameters, alpha)
        found = classify(scores)
        return {
            task.name: label_metrics({key: found[key] for key in own}, self.labels, self.metrics)
            for task, own in zip(tasks, prompts, strict=True)
        }


@dataclass(frozen=True)
class Headed:
    """Accuracy and Matthews of a classification head's classes, Pearson of a regression head's numbers."""

    def __call__(
        self, model: Any, tasks: Sequence[Task], parameters: Mapping[str, Tensor], alpha: Tensor | None
    ) -> Values:
        found: dict[str, Any] = {}
        for key, output in self._outputs(model, tasks, parameters, alpha).items():
            found[key] = output.argmax().item() if output.numel() > 1 else output.item()
        values: Values = {}
        for task in tasks:
            expected = {query_id(task, i): example.labels[0] for i, example in enumerate(task.query)}
            own = {key: found[key] for key in expected}
            if task.kind.name == "regression":
                values[task.name] = {"pearson": _functions()["pearson"](own, expected)}
            else:
                values[task.name] = label_metrics(own, expected, LABEL)
        return values

    @torch.no_grad()
    def _outputs(
        self, model: Any, tasks: Sequence[Task], parameters: Mapping[str, Tensor], alpha: Tensor | None
    ) -> dict[str, Tensor]:
        """{id: logits}; one query example of each task at a time, so that ids need no bookkeeping."""
        kind, found = tasks[0].kind, dict[str, Tensor]()
        if not isinstance(kind, Classification):
            raise ValueError(f"task {tasks[0].name!r}: has kind {kind.name!r}, expected one with a classification head")
        device = next(model.parameters()).device
        for i in range(max(len(task.query) for task in tasks)):
            asked = [task for task in tasks if i < len(task.query)]
            inputs = kind.collate([task.query[i] for task in asked]).inputs
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            offsets = torch.tensor([0, *(i < len(task.query) for task in tasks)]).cumsum(0)
            with mode(model, False), running(model, parameters, Offsets(offsets), alpha):
                logits = kind.logits(model, inputs)
            found |= {query_id(task, i): own for task, own in zip(asked, logits, strict=True)}
        return found


def text_metrics(texts: Mapping[str, str], references: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of TEXT for these texts."""
    functions, expected = _functions(), {key: references[key] for key in texts}
    scores = functions["rouge"](texts, expected)._asdict() if any(name.startswith("rouge") for name in metrics) else {}
    if "bleu" in metrics:
        scores["bleu"] = functions["bleu"](texts, expected)
    return {name: scores[name] for name in metrics}


def label_metrics(found: Mapping[str, Any], labels: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics of LABEL for these labels."""
    expected = {key: labels[key] for key in found}
    return {name: _functions()[name](found, expected) for name in metrics}


def _functions() -> dict[str, Callable[..., Any]]:
    """Of `mltd.metrics`, whose libraries take a second to import: only who measures waits for it."""
    from mltd import metrics

    return {name: getattr(metrics, name) for name in ("bleu", "rouge", "accuracy", "matthews", "pearson")}
