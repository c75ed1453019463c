"""``tarp demo``: meta-train a pretrained model on dialogue topics and compare the methods on topics never seen.

Every part leaves its result in the run's folder and is read back from there, so an interrupted run goes on where it
stopped: methods and their training keep their own state, the other parts are one JSON file each.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mltd import report
from mltd.baselines import Comparison, MethodResult, run_method
from mltd.bench.cases import Case, GateError, measure
from mltd.bench.layers import layer_cases
from mltd.checkpoint import read_json, write_json
from mltd.data.chatterbot import Split, read_topics, split_topics
from mltd.data.smollm2 import NAME, load_smollm2
from mltd.demo_recipe import METHODS, Recipe
from mltd.demo_replies import replies
from mltd.inner_loop import InnerConfig
from tarp_kernels import apply_tarp, load_tarp, tarp_parameters

MADE = ("run.json", "parts", "methods", "model")
"""What a run makes beside the report's files, and what a fresh start deletes together with them."""


@dataclass(frozen=True)
class Ingredients:
    """What a demo works on: the name of the model, how to get it anew, its tokenizer, and the topics."""

    name: str
    make_model: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    split: Split


def run_demo(out: Path, recipe: Recipe, fresh: bool, console: Console) -> dict[str, Any]:
    """The demo on SmolLM2-135M and the corpus's topics; returns what report.json holds.

    Raises FileNotFoundError where a data package is missing, FileExistsError where ``out`` holds another run.
    """
    if fresh:
        clear(out)
    finished = finished_report(out, recipe)
    if finished is not None:
        report.show(finished, console)
        console.print(f"this run in {out} finished at {finished['machine']['time']}; `--fresh` starts anew")
        return finished
    return run(out, recipe, smollm2_ingredients(out, recipe, console), console)


def smollm2_ingredients(out: Path, recipe: Recipe, console: Console) -> Ingredients:
    """SmolLM2-135M from its package, converted on first use, and the topics split as the recipe says."""

    def load() -> Any:
        return load_smollm2(fallback=out / "model", say=lambda line: console.print(line, markup=False))

    tokenizer = load().tokenizer
    return Ingredients(NAME, lambda: load().model, tokenizer, split_topics(read_topics(), tokenizer, **recipe.split))


def clear(out: Path) -> None:
    """Delete what a run made in ``out`` and nothing else."""
    for name in (*MADE, *report.FILES):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def finished_report(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The report of a finished run of this recipe in ``out``; None where it has yet to be made or finished.

    Raises FileExistsError when the folder holds a run of another recipe or other versions.
    """
    mark = out / "run.json"
    if mark.exists() and read_json(mark)["fingerprint"] != recipe.fingerprint():
        raise FileExistsError(
            f"{out} holds a run of another recipe or of other package versions: "
            "start anew with `--fresh`, or choose another folder with `--out`"
        )
    done = out / "report.json"
    return read_json(done) if mark.exists() and done.exists() else None


def run(out: Path, recipe: Recipe, ingredients: Ingredients, console: Console) -> dict[str, Any]:
    """Run, or go on with, a demo in ``out``; writes report.json, CSVs and pictures and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "run.json", {"fingerprint": recipe.fingerprint()})
    split = ingredients.split
    topics = len(report.topics_of(split.train.names))
    console.print(
        f"[bold]{ingredients.name}[/]: {len(split.train)} tasks of {topics} topics to train on, "
        f"{len(split.validation)} topics to choose rates and stopping on, {len(split.test)} never seen before the end"
    )
    comparison = Comparison(
        make_model=ingredients.make_model,
        train=split.train,
        validation=split.validation,
        test=split.test,
        tarp=recipe.tarp,
        inner=recipe.inner,
        meta=recipe.meta,
        steps=recipe.steps,
        run_dir=out / "methods",
    )
    results = {}
    for name in METHODS:
        console.print(f"· {name}")
        results[name] = run_method(name, comparison, progress=console.is_terminal)
    speed = _part(out, "speed", console, lambda: measure_speed(ingredients, recipe))
    said = _part(out, "replies", console, lambda: _replies(ingredients, recipe, results["mltd"]))
    made = report.make(ingredients.name, split, recipe, results, speed, said, out)
    report.show(made, console)
    console.print(f"report, CSVs and pictures are in {out}")
    return made


def _part(out: Path, name: str, console: Console, make: Callable[[], Any]) -> Any:
    """The part's result from its file, or made now and kept there."""
    path = out / "parts" / f"{name}.json"
    if path.exists():
        return read_json(path)["result"]
    console.print(f"· {name}")
    began = time.perf_counter()
    result = make()
    write_json(path, {"seconds": time.perf_counter() - began, "result": result})
    return result


def _replies(ingredients: Ingredients, recipe: Recipe, mltd: MethodResult) -> list[dict[str, Any]]:
    if mltd.adapter is None or mltd.inner is None:
        raise ValueError("the method 'mltd' has left no adapter; run it with a run_dir")
    model: Any = load_tarp(ingredients.make_model(), mltd.adapter)
    inner = replace(InnerConfig(**mltd.inner), steps=mltd.stop_step)
    tasks = ingredients.split.test[: recipe.replies]
    return [dict(reply) for reply in replies(model, ingredients.tokenizer, tasks, inner)]


def measure_speed(ingredients: Ingredients, recipe: Recipe) -> list[dict[str, Any]]:
    """TarpLinear beside nn.Linear, unfused PyTorch and PEFT LoRA on the shapes of the model's own adapted layers.

    A case whose gate is red is left out and named with what was wrong.
    """
    shapes = [f"{{rows}}x{shape}x{recipe.tarp.r}" for shape in adapted_shapes(ingredients.make_model(), recipe)]
    cases = layer_cases(
        [shape.format(rows=1024) for shape in shapes], [shape.format(rows=1) for shape in shapes], recipe.rounds
    )
    return [row for case in cases for row in _rows(case)]


def _rows(case: Case) -> list[dict[str, Any]]:
    try:
        return [dict(vars(timing)) for timing in measure(case)]
    except GateError as error:
        return [{"kind": case.kind, "shape": case.shape, "red": str(error)}]


def adapted_shapes(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Distinct "in_features x out_features" of the layers that the recipe adapts, in order of appearance."""
    apply_tarp(model, recipe.tarp)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tarp_parameters(model))
    layers = [model.get_submodule(name) for name in names]
    return list(dict.fromkeys(f"{layer.in_features}x{layer.out_features}" for layer in layers))
