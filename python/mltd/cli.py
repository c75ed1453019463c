"""The command ``tarp``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mltd.checkpoint import CheckpointError

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


@contextlib.contextmanager
def _plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors that say what to do need no traceback around them."""
    try:
        yield
    except kinds as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point. Nothing here fetches anything, so Hugging Face libraries are told not to try."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
