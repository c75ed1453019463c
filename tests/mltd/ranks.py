"""Runs of one, two and three processes for test_distributed.py.

    python -m tests.mltd.ranks FOLDER           every case; a process that imports once and then only forks
    torchrun -m tests.mltd.ranks endless RUN    one run that goes on until it is stopped

Process `rank` of `size` leaves what it saw in FOLDER/play-size-rank.pt and FOLDER/resume-size-rank.pt.
"""

import contextlib
import os
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mltd import Comparison, InnerConfig, MetaConfig, MetaTrainer, meta_trainer, run_method
from mltd.checkpoint import latest_checkpoint
from mltd.meta_gradient import OBJECTIVES
from mltd.sharded import is_sharded, whole
from tarp_kernels import SearchCellConfig, TarpConfig, tarp_parameters
from tarp_kernels.files import write_atomically
from tests.mltd.conftest import bare_model, random_tasks, tarp_model

SIZES = (1, 2, 3)
ADAPTER = InnerConfig(steps=2, lr=1e-2)
ALL = replace(ADAPTER, adapts=("all",))
OUTER: dict[str, Any] = {"iterations": 3, "tasks_per_batch": 3, "outer_lr": 0.05, "outer_optimizer": "sgd"}
ADAM = {**OUTER, "outer_optimizer": "adam", "outer_lr": 1e-3}


@dataclass(frozen=True)
class Case:
    config: MetaConfig
    adapter: dict[str, Any] | None = field(default_factory=dict)  # of TarpConfig; None: no adapter
    ddp: bool = False
    sharded: bool = False


CASES = {
    "first order": Case(MetaConfig(ADAPTER, **OUTER)),
    "fewer tasks than processes": Case(MetaConfig(ADAPTER, **{**OUTER, "tasks_per_batch": 1})),
    "accumulate": Case(MetaConfig(ADAPTER, **{**OUTER, "tasks_per_batch": 1}, accumulate=4, outer_clip=0.1)),
    "second order": Case(MetaConfig(replace(ADAPTER, optimizer="sgd"), **OUTER, objective="second_order")),
    "reptile": Case(MetaConfig(ADAPTER, **OUTER, objective="reptile")),
    "multitask": Case(MetaConfig(ADAPTER, **OUTER, objective="multitask")),
    "adam": Case(MetaConfig(ADAPTER, **ADAM)),
    "rates": Case(MetaConfig(ADAPTER, **OUTER, learn_rates=True, rates_lr=1e-3)),
    "controller": Case(
        MetaConfig(ADAPTER, **OUTER, trains=("adapter", "controller"), entropy_weight=0.1),
        {"search_cell": SearchCellConfig(width=4)},
    ),
    "maml": Case(MetaConfig(ALL, **OUTER, trains=("all",)), None),
    "base": Case(MetaConfig(ADAPTER, **OUTER, trains=("base",)), ddp=True),
    "base, multitask": Case(MetaConfig(ADAPTER, **OUTER, trains=("base",), objective="multitask"), ddp=True),
    "sharded base": Case(MetaConfig(ADAPTER, **OUTER, trains=("base", "adapter"), outer_clip=0.1), sharded=True),
    "sharded base, multitask": Case(
        MetaConfig(ADAPTER, **OUTER, trains=("base",), objective="multitask"), sharded=True
    ),
    "sharded and frozen": Case(MetaConfig(ADAPTER, **OUTER), sharded=True),
    "validated": Case(
        MetaConfig(ADAPTER, **{**OUTER, "iterations": 12, "outer_lr": 10.0}, validate_every=1, patience=2),
    ),
}
PLAYED = {size: [name for name, case in CASES.items() if size < 3 or not case.sharded] for size in SIZES}  # in time
DROPOUT = MetaConfig(
    replace(ADAPTER, train_mode=True), iterations=2, tasks_per_batch=3, outer_lr=1e-2, validate_every=1
)
MOVED = MetaConfig(ADAPTER, **ADAM, trains=("base", "adapter"), validate_every=1)
ENDLESS = Case(MetaConfig(ADAPTER, **{**OUTER, "iterations": 10**6, "outer_lr": 1e-3}, checkpoint_every=10**6))
STOPPED = ("killed", "told")


def trainer(
    case: Case, directory: Path | None = None, rank: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0
):
    tasks, validation = random_tasks(5, seed), random_tasks(2, 9, "validation")
    # not Llama, whose norms compute in float32 always
    model = bare_model("gpt2").to(dtype) if case.adapter is None else tarp_model("gpt2", dtype, **case.adapter)
    if case.config.objective == "second_order":
        model.set_attn_implementation("eager")
    if dist.is_initialized():
        model = DistributedDataParallel(model) if case.ddp else shard(model) if case.sharded else model
    made = MetaTrainer(model, tasks, case.config, directory, validation if case.config.validate_every else None)
    with torch.no_grad():
        for value in made.outer.all.values():
            if not is_sharded(value):
                value.add_(rank)  # where the first process starts is what counts
    return made


def shard(model):
    own = set(tarp_parameters(model).values())
    for layer in model.transformer.h:
        fully_shard(layer, ignored_params=own)
    return fully_shard(model, ignored_params=own)


def outcome(made: MetaTrainer) -> dict[str, Any]:
    began = {name: whole(value.detach()).clone() for name, value in made.outer.all.items()}
    result = made.train(progress=False)
    return {
        "began": began,
        "ended": {name: whole(value.detach()).clone() for name, value in made.outer.all.items()},
        "iterations": result.iterations,
        "iteration": result.iteration,
        "stopped_early": result.stopped_early,
        "validation": result.validation,
        "tokens": result.tokens,
        "writes": made.log is not None,
    }


def error_of(run) -> str:
    try:
        run()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def before_gradients(act):
    """Within the block `act(learner, tasks)` is called before each first-order gradient."""
    real = OBJECTIVES["first_order"]

    def objective(problem, tasks, alpha):
        act(problem.learner, tasks)
        return real(problem, tasks, alpha)

    OBJECTIVES["first_order"] = objective
    try:
        yield
    finally:
        OBJECTIVES["first_order"] = real


def diverges(directory: Path, rank: int, size: int) -> str:
    """A task breaks, in the last process alone."""
    made = trainer(Case(replace(CASES["first order"].config, checkpoint_every=5)), directory)

    def break_it(learner, tasks):
        if made.iteration == 1 and rank == size - 1:
            with torch.no_grad():
                next(iter(learner.shared.values())).fill_(torch.nan)

    with before_gradients(break_it):
        return error_of(lambda: made.train(progress=False))


def told(rank: int, size: int, sharded: bool) -> str:
    """The last process alone is told to end."""
    made = trainer(replace(CASES["first order"], sharded=sharded))

    def tell(learner, tasks):
        if made.iteration == 1 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with before_gradients(tell):
        return error_of(lambda: made.train(progress=False))


def share(rank: int) -> dict[str, list]:
    """What a process does in a run: the tasks that it takes, those that it validates, and what dropout would draw."""
    made = trainer(Case(replace(DROPOUT, accumulate=2)), rank=rank)
    did: dict[str, list] = {"tasks": [], "validation": [], "drawn": []}
    real = meta_trainer.evaluate

    def note(learner, tasks):
        did["drawn"] += torch.rand(2).tolist()
        did["tasks"] += [task.name for task in tasks]

    def evaluation(model, tasks, *args, **rest):
        did["validation"] += [task.name for task in tasks]
        return real(model, tasks, *args, **rest)

    meta_trainer.evaluate = evaluation
    try:
        with before_gradients(note):
            made.train(progress=False)
    finally:
        meta_trainer.evaluate = real
    return did


def move(folder: Path, rank: int, size: int) -> list[str]:
    """A run of a sharded model that goes on sharded and then whole; returns what cannot be done with a sharded one."""
    for sharded, iterations in ((True, 1), (True, 2), (False, 3)):
        case = Case(replace(MOVED, iterations=iterations), sharded=sharded)
        outcome(trainer(case, folder / f"moved-{size}", rank))
    cells = {"search_cell": SearchCellConfig(width=4)}
    impossible = (
        Case(replace(MOVED, inner=ALL), sharded=True),
        Case(replace(MOVED, objective="second_order"), sharded=True),
        Case(replace(MOVED, trains=("adapter", "controller")), cells, sharded=True),
    )
    return [error_of(lambda case=case: trainer(case)) for case in impossible]


def compared(directory: Path) -> dict[str, Any]:
    """`run_method` with something to choose everywhere, and once more when it is done; what this process wrote."""
    meta = [MetaConfig(ADAPTER, **{**OUTER, "outer_lr": lr}) for lr in (0.01, 0.05)]
    inner = [replace(ADAPTER, lr=lr) for lr in (1e-3, 1e-2)]
    sets = {name: random_tasks(3, seed, name) for seed, name in enumerate(("train", "validation", "test"))}
    asked = Comparison(
        bare_model, **sets, tarp=TarpConfig(r=2), inner={"tarp": inner}, meta={"tarp": meta}, run_dir=directory
    )
    wrote: list[str] = []

    def noting(path: Path, data: bytes) -> None:
        wrote.append(path.name)
        write_atomically(path, data)

    with mock.patch("mltd.checkpoint.write_atomically", noting), mock.patch("mltd.starts.write_atomically", noting):
        result = run_method("tarp", asked, progress=False)
        again = run_method("tarp", asked, progress=False)
    shown = {"perplexity": result.curve.perplexity_by_step, "inner": result.inner, "meta": result.meta}
    other = replace(asked, steps=(0, 2))
    said = error_of(lambda: run_method("tarp", other, progress=False))
    return {**shown, "wrote": wrote, "again": again.curve.perplexity_by_step, "other": said}


def play(folder: Path, rank: int, size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {name: outcome(trainer(CASES[name], rank=rank)) for name in PLAYED[size]}
    seen["logged"] = outcome(trainer(CASES["validated"], folder / f"logged-{size}", rank))
    seen["diverged"] = diverges(folder / f"diverged-{size}", rank, size)
    seen["told"] = told(rank, size, sharded=False)
    seen["told, sharded"] = told(rank, size, sharded=size == 2)
    seen["other tasks"] = error_of(lambda: trainer(CASES["first order"], seed=rank).train(progress=False))
    damaged = folder / f"damaged-{size}" / "iteration-00000001.safetensors"
    if rank == 0:
        damaged.parent.mkdir()
        damaged.write_bytes(b"nothing")
    seen["damaged"] = error_of(lambda: trainer(CASES["first order"], damaged.parent).train(progress=False))
    case = Case(DROPOUT, {"dropout": 0.3})
    outcome(trainer(case, folder / f"parts-{size}", rank, torch.float32))
    longer = replace(case, config=replace(DROPOUT, iterations=4))
    outcome(trainer(longer, folder / f"parts-{size}", rank, torch.float32))
    outcome(trainer(longer, folder / f"whole-{size}", rank, torch.float32))
    seen["compared"] = compared(folder / f"compared-{size}")
    if size < 3:
        seen["moved"] = move(folder, rank, size)
    seen["share"] = share(rank)
    return seen


def resume(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """What two processes began, and others stopped, goes on in other numbers of processes, four iterations further."""
    seen: dict[str, Any] = {}
    for name in STOPPED:
        begun = latest_checkpoint(folder / name).iteration
        longer = replace(ENDLESS, config=replace(ENDLESS.config, iterations=begun + 4))
        seen[name] = outcome(trainer(longer, folder / f"{name}-{size}", rank))
        if size == 1:
            seen[f"{name}, whole"] = outcome(trainer(longer))
    return seen


def endless(directory: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    made = trainer(ENDLESS, directory / "run", int(rank))
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    try:
        made.train(progress=False)
    except BaseException as error:
        (directory / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def fork(folder: Path, rank: int, size: int, act) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        if size > 1:
            where = f"file://{folder}/group-{act.__name__}-{size}"
            patience = timedelta(seconds=90)  # processes that do not meet are a failure, and no endless wait
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=patience)
        torch.save(act(folder, rank, size), folder / f"{act.__name__}-{size}-{rank}.pt")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def in_processes(folder: Path, size: int, act) -> None:
    pids = [fork(folder, rank, size, act) for rank in range(size)]
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * size, statuses


def main(folder: Path) -> None:
    for size in SIZES:
        in_processes(folder, size, play)
    for size in SIZES:
        for name in STOPPED:
            shutil.copytree(folder / name, folder / f"{name}-{size}")
        in_processes(folder, size, resume)


if __name__ == "__main__":
    if sys.argv[1] == "endless":
        endless(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
