"""The demo's results in every form: report.json, CSVs, pictures drawn from the CSVs, and tables on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mltd import plots
from mltd.baselines import METHODS, MethodResult
from mltd.bench.table import geometric_means
from mltd.checkpoint import JsonLines, write_json
from mltd.machine import facts, versions
from mltd.verdict import verdict

if TYPE_CHECKING:
    from mltd.data.chatterbot import Split
    from mltd.demo_recipe import Recipe

CSVS = ("curves.csv", "topics.csv", "training.csv", "speed.csv")
PICTURES = ("curves.png", "topics.png", "training.png", "speed.png")
FILES = ("report.json", *CSVS, *PICTURES)


def topics_of(names: Iterable[str]) -> list[str]:
    """Topics behind task names: a training topic with many pairs gives tasks "name", "name#2", …"""
    return list(dict.fromkeys(name.partition("#")[0] for name in names))


def make(
    model: str,
    split: Split,
    recipe: Recipe,
    results: Mapping[str, MethodResult],
    speed: Sequence[Mapping[str, Any]],
    replies: Sequence[Mapping[str, Any]],
    out: Path,
) -> dict[str, Any]:
    """Write every file of the report into ``out``, report.json last; returns what that one holds."""
    methods = {name: _method(result, recipe.steps) for name, result in results.items()}
    timed = pd.DataFrame([row for row in speed if "red" not in row])
    found = {
        "model": model,
        "train_tasks": topics_of(split.train.names),
        "validation_tasks": list(split.validation.names),
        "held_out_tasks": list(split.test.names),
        "examples": {
            "support": len(split.test[0].support),
            "query": len(split.test[0].query),
            "train_tasks": list(split.train.names),
        },
        "methods": methods,
        "verdict": [*verdict(methods), _effort(methods)],
        "replies": list(replies),
        "speed": {
            "baseline": "nn.Linear, frozen",
            "geometric_means": _means(timed),
            "rows": list(speed),
        },
        "versions": versions(),
        "machine": facts(),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_csvs(methods, timed, out)
    draw(out)
    write_json(out / "report.json", found)
    return found


def _method(result: MethodResult, steps: Sequence[int]) -> dict[str, Any]:
    """One method as JSON. A method that does not adapt has the same perplexity at every step."""
    plain = result.to_json()
    curve = plain.pop("curve")
    by_step = curve["perplexity_by_step"]
    if result.name == "zero-shot":
        by_step = {str(step): by_step["0"] for step in steps}
    return {
        "perplexity_by_step": by_step,
        "seconds": result.seconds,
        "parameters": plain.pop("parameters"),
        "perplexity_at_stop": by_step[str(result.stop_step)],
        "stop_step": plain.pop("stop_step"),
        "per_task": curve["per_task"],
        "tokens": curve["tokens"],
        "chosen_on_validation": {
            "inner": plain.pop("inner"),
            "meta": plain.pop("meta"),
            "perplexity_by_step": plain.pop("validation"),
        },
        "train_tokens": plain.pop("train_tokens"),
        "train_seconds": plain.pop("train_seconds"),
        "adapt_seconds": plain.pop("adapt_seconds"),
        "select_seconds": plain.pop("select_seconds"),
    }


def _means(timed: pd.DataFrame) -> dict[str, dict[str, float]]:
    if timed.empty:
        return {}
    means = geometric_means(timed)
    return {str(kind): {str(name): float(value) for name, value in row.items()} for kind, row in means.iterrows()}


def _write_csvs(methods: Mapping[str, Any], timed: pd.DataFrame, out: Path) -> None:
    curves = [
        {"method": name, "step": int(step), "perplexity": value}
        for name, method in methods.items()
        for step, value in method["perplexity_by_step"].items()
    ]
    topics = [
        {"method": name, "topic": topic, "step": int(step), "perplexity": value, "tokens": method["tokens"][topic]}
        for name, method in methods.items()
        for topic, by_step in method["per_task"].items()
        for step, value in by_step.items()
        if int(step) == method["stop_step"]
    ]
    frames = (pd.DataFrame(curves), pd.DataFrame(topics), _training(out / "methods"), timed)
    for name, frame in zip(CSVS, frames, strict=True):
        frame.to_csv(out / name, index=False, float_format="%.6g")


def _training(methods: Path) -> pd.DataFrame:
    """Every outer iteration of the trained methods, from their logs: mean loss, and the score on validation topics."""
    rows = []
    for log in sorted(methods.glob("*/train-*/log.jsonl")):
        for record in JsonLines(log).read():
            losses = list(record.get("losses", {}).values())
            rows.append(
                {
                    "method": log.parts[-3],
                    "candidate": log.parts[-2].removeprefix("train-"),
                    "iteration": record["iteration"],
                    "loss": sum(losses) / len(losses) if losses else None,
                    "score": record.get("validation_score"),
                    "seconds": record["seconds"],
                }
            )
    return pd.DataFrame(rows, columns=["method", "candidate", "iteration", "loss", "score", "seconds"])


def _effort(methods: Mapping[str, Any]) -> str:
    """What equal outer updates on equal examples hide: an inner loop goes over its examples several times."""
    spent = [
        f"{name} {methods[name]['train_tokens'] / 1000:.0f} thousand tokens in {methods[name]['train_seconds']:.0f} s"
        for name in methods
        if METHODS[name].trains
    ]
    return f"Outer training, as many updates from the same examples, took {' and '.join(spent)}."


def draw(out: Path) -> None:
    """Draw every picture of a report from the CSVs in ``out``."""
    curves, topics, training = (pd.read_csv(out / name) for name in CSVS[:3])
    plots.adaptation_curves(curves, "Adapting to topics never seen", out / "curves.png")
    plots.topics(topics, "Each unseen topic, where validation said to stop", out / "topics.png")
    plots.training(training, "Outer training, judged on validation topics", out / "training.png")
    if (out / "speed.csv").read_text().strip():
        title = "TarpLinear on this model's own shapes"
        plots.speed(pd.read_csv(out / "speed.csv"), title, out / "speed.png")


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a report: perplexities, the verdict, replies, and speed."""
    _show_methods(found, console)
    for line in found["verdict"]:
        console.print(f"- {line}", markup=False)
    _show_replies(found["replies"], console)
    _show_speed(found["speed"], console)


def _show_methods(found: Mapping[str, Any], console: Console) -> None:
    methods = found["methods"]
    steps = list(next(iter(methods.values()))["perplexity_by_step"])
    count, support = len(found["held_out_tasks"]), found["examples"]["support"]
    table = Table(
        title=f"{found['model']}\n"
        f"perplexity of held-out replies on {count} unseen topics, after adapting to {support} pairs of each",
        title_justify="left",
        box=box.SIMPLE_HEAD,  # fits 80 columns
        caption="[underline]underlined[/]: where validation topics said to stop. Seconds: training and adapting, "
        "without the search for settings.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for step in steps:
        table.add_column(f"{step} steps" if step == steps[0] else step, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("parameters", justify="right")
    best = min(method["perplexity_at_stop"] or float("inf") for method in methods.values())
    for name, method in methods.items():
        cells = []
        for step in steps:
            cell = _perplexity(method["perplexity_by_step"][step])
            if int(step) == method["stop_step"] and name != "zero-shot":
                cell = f"[underline]{cell}[/]"
            cells.append(cell)
        style = "bold" if method["perplexity_at_stop"] == best else ""
        table.add_row(name, *cells, f"{method['seconds']:.0f}", f"{method['parameters']:,}", style=style)
    console.print(table)


def _perplexity(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _show_replies(replies: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not replies:
        return
    table = Table(title="replies on unseen topics", title_justify="left", show_lines=True)
    for name in ("topic and prompt", "in the corpus", "pretrained", "MLtD, adapted"):
        table.add_column(name, overflow="fold", ratio=1)
    for reply in replies:
        prompt = f"[bold]{escape(reply['topic'])}[/]\n{escape(reply['prompt'])}"
        table.add_row(prompt, *(escape(reply[key] or "(an empty line)") for key in ("reference", "before", "after")))
    console.print(table)


def _show_speed(speed: Mapping[str, Any], console: Console) -> None:
    means = speed["geometric_means"]
    red = [row for row in speed["rows"] if "red" in row]
    if means:
        contenders = list(next(iter(means.values())))
        title = "time as a multiple of the frozen nn.Linear, on this model's shapes"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for name in contenders:
            table.add_column(plots.CONTENDERS.get(name, name), justify="right")
        for kind, ratios in means.items():
            table.add_row(kind, *(f"{ratios[name]:.2f}" for name in contenders))
        console.print(table)
    for row in red:
        console.print(f"[red]{row['kind']} {row['shape']} is not reported, its gate is red: {escape(row['red'])}")
