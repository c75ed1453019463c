"""The command ``tarp``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mltd.checkpoint import CheckpointError

if TYPE_CHECKING:
    from mltd.run_config import RunConfig

app = typer.Typer(
    help="Fused kernels for task-adaptive reparameterisation (TARP), and meta-learning on top of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; what is finished there stays.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in the folder's run and start anew.")] = False,
) -> None:
    """Meta-train SmolLM2-135M on dialogue topics and compare the methods on topics never seen."""
    from mltd.demo import run_demo
    from mltd.demo_recipe import RECIPE

    with _plain_errors(FileNotFoundError, FileExistsError, CheckpointError):
        run_demo(out, RECIPE, fresh, Console())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show which backends, compilers, threads and GPU there are, and why a backend is off."""
    from mltd.doctor import examine, show

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console())


@app.command()
def bench(
    shapes: Annotated[list[str] | None, typer.Argument(help="rows x in x out x rank, e.g. 512x768x3072x8")] = None,
    out: Annotated[Path, typer.Option(help="Folder for CSVs and pictures.")] = Path("runs/bench"),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of every contender of a case.")] = 25,
    only: Annotated[str, typer.Option(help="layers, cells, models, inner, memory, or all.")] = "all",
    tune: Annotated[bool, typer.Option("--tune", help="Measure launch configurations of the GPU kernels.")] = False,
) -> None:
    """Measure speed and memory of TARP layers, search cells and whole models beside what one would write in PyTorch."""
    from mltd.bench.run import PARTS, run_bench

    if tune:
        from mltd.bench.tune import run_tune

        with _plain_errors(ValueError, OSError):
            status = run_tune(shapes or None, Console())
        raise typer.Exit(status)
    if only not in ("all", *PARTS):
        raise typer.BadParameter(f"got {only!r}, expected all, {', '.join(PARTS)}", param_hint="--only")
    parts = PARTS if only == "all" else (only,)
    with _plain_errors(ValueError):
        status = run_bench(out, shapes or None, rounds, parts, Console())
    raise typer.Exit(status)


Start = Annotated[Path | None, typer.Argument(help="Folder of a training run, or of a start; none: the initial state.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; default: those of the run.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. meta.outer_lr=1e-3; goes first.")]


@app.command()
def train(
    config: Config = None,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run, in place of the setting out.")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with a run; never: refuse one; must: refuse none.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="All up to the first step, then stop.")] = False,
    log_to: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb, beside log.jsonl.")] = None,
) -> None:
    """Meta-train a start for adaptation; the same command goes on with a run that was interrupted."""
    with _run_errors():
        from mltd.config_file import load_config
        from mltd.runs import run_train

        options = {"out": None if out is None else str(out), "log_to": log_to or None}
        given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
        run_train(load_config(config, [*(changes or []), *given]), resume, dry_run, typer.echo)


@app.command()
def adapt(
    examples: Annotated[Path, typer.Option(help="A .jsonl or .csv file with columns source and target.")],
    out: Annotated[Path, typer.Option(help="Folder for what is adapted.")],
    start: Start = None,
    query: Annotated[Path | None, typer.Option(help="Another one to measure on; none: the examples.")] = None,
    config: Config = None,
    changes: Set = None,
) -> None:
    """Adapt a trained start, or a method's initial state, to the examples of one task."""
    with _run_errors():
        from mltd.runs import run_adapt

        run_adapt(_settings(start, config, changes), start, examples, query, out, typer.echo)


@app.command("eval")
def evaluate(
    start: Start = None,
    config: Config = None,
    changes: Set = None,
    metrics: Annotated[list[str] | None, typer.Option(help="Beside perplexity: bleu, rouge1, accuracy, …")] = None,
    tasks: Annotated[str, typer.Option(help="Which tasks that are held out: test or validation.")] = "test",
    out: Annotated[Path | None, typer.Option(help="JSON file of the curve; none: in the run's folder.")] = None,
) -> None:
    """Adapt to each held-out task and measure it at several steps."""
    with _run_errors():
        from mltd.runs import run_eval

        run_eval(_settings(start, config, changes), start, tasks, metrics or [], out, typer.echo)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, a start or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a file or folder of a run holds and whether it is whole; status 1 where something is damaged."""
    with _run_errors():
        from mltd.inspection import as_text, inspect

        found = inspect(path)
    typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))
    for damage in found["damaged"]:
        typer.echo(f"damaged: {damage}", err=True)
    raise typer.Exit(1 if found["damaged"] else 0)


def _settings(start: Path | None, config: Path | None, changes: list[str] | None) -> RunConfig:
    """The settings of a file; where none is named, those of the run that the start lies in."""
    from mltd.config_file import load_config
    from mltd.run_starts import CONFIG

    if config is None and start is not None:
        config = start / CONFIG
        if not config.exists():
            raise FileNotFoundError(f"{config}: does not exist; name a run's folder, or settings with --config")
    return load_config(config, changes or [])


@contextlib.contextmanager
def _run_errors() -> Iterator[None]:
    """Mistakes of a user in one line; what SIGTERM interrupted ends with its status."""
    from safetensors import SafetensorError

    from mltd.meta_trainer import Terminated

    try:
        with _plain_errors(ValueError, TypeError, OSError, ArithmeticError, ImportError, SafetensorError):
            yield
    except Terminated as end:
        typer.echo(str(end), err=True)
        raise


@contextlib.contextmanager
def _plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors that say what to do need no traceback around them."""
    try:
        yield
    except kinds as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point. Nothing here fetches anything, so Hugging Face libraries are told not to try."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
