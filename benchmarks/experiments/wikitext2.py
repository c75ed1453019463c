"""WikiText-2: perplexity against the number of examples and against the rank, without meta-learning.

    python -m benchmarks.experiments.wikitext2       # writes benchmarks/experiments/results/wikitext2.json

A small GPT-2 is trained here on other text (books and MASC) and adapted to WikiText-2: to windows of its validation
file, which stands for the training file that is not here, and judged on windows of its test file. A task is a draw of
these windows, so the intervals say how much the draw matters. Full fine-tuning, LoRA and TARP are compared over the
number of windows, and dynamic TARP with its static relatives, bilinear and Kronecker, over the rank.
"""

import argparse
from functools import partial

import torch

from benchmarks.experiments.common import (
    Claim,
    Study,
    arguments,
    folder,
    run_methods,
    settings_of,
)
from benchmarks.experiments.small_model import Losses, pretrained, train_tokenizer
from mltd import Example, InnerConfig, Task, TaskSet
from mltd.baselines import Comparison
from mltd.data.books import read_books
from mltd.data.encoding import windows
from mltd.data.masc import read_masc
from mltd.data.records import Record, pooled, stable_order
from mltd.data.wikitext import read_wikitext
from tarp_kernels import TarpConfig

WINDOWS, RANKS = (8, 32, 128), (2, 8, 32)
RANK, SHOTS = 8, 32  # what is held fixed while the other one varies
METHODS = ("finetune", "lora", "tarp-nometa")
KINDS = {"tarp-nometa": "dynamic", "bilinear": "bilinear", "kronecker": "kronecker"}
PUBLISHED = {
    "BLEU on E2E, DART, WebNLG with GPT-2 medium": {
        "dynamic": [69.7, 47.9, 55.3],
        "bilinear": [68.8, 46.7, 54.0],
        "kronecker": [68.2, 45.6, 53.1],
        "lora": [70.4, 47.1, 55.3],
    }
}


def label_of(name: str, count: int, rank: int) -> str:
    """What a point of the sweep is called: all weights have no rank."""
    return f"{name}, {count} windows" + ("" if name == "finetune" else f", rank {rank}")


def sweep() -> dict[str, tuple[str, int, int]]:
    """Label -> method or kind, windows, rank: over the windows at one rank, then over the ranks at one number."""
    points = [(method, count, RANK) for count in WINDOWS for method in METHODS]
    points += [(kind, SHOTS, rank) for rank in RANKS for kind in KINDS if (kind, rank) != ("tarp-nometa", RANK)]
    return {label_of(*point): point for point in points}


def claims() -> tuple[Claim, ...]:
    """More examples, higher ranks, dynamic before its static relatives, and TARP before all weights."""
    few, many = WINDOWS[0], WINDOWS[-1]
    low, high = RANKS[0], RANKS[-1]
    static = "paper: dynamic before static on three NLG data sets, in BLEU"
    whole = "paper: 33.19 against 33.67 in multi-domain language modelling"
    found = [Claim(label_of(name, many, RANK), label_of(name, few, RANK), "more examples help") for name in METHODS]
    found += [
        Claim(label_of(kind, SHOTS, high), label_of(kind, SHOTS, low), "a higher rank fits more") for kind in KINDS
    ]
    found += [
        Claim(label_of("tarp-nometa", SHOTS, rank), label_of(kind, SHOTS, rank), static)
        for rank in RANKS
        for kind in ("bilinear", "kronecker")
    ]
    found += [
        Claim(label_of("tarp-nometa", count, RANK), label_of("finetune", count, RANK), whole) for count in WINDOWS
    ]
    return tuple(found)


def drawn(texts: dict[str, list[Example]], shots: int, asked: argparse.Namespace) -> dict[str, TaskSet]:
    """Validation and test tasks: draws of `shots` windows of the first file, and of others to judge by.

    A smaller number of shots is the beginning of a larger one, and what judges is the same for every number.
    """
    largest, query = max(WINDOWS), asked.query
    order = sorted(texts["valid"], key=lambda example: stable_order(repr(example.input_ids)))
    judges = sorted(texts["test"], key=lambda example: stable_order(repr(example.input_ids)))
    needed = (asked.validation_draws * query + (asked.draws + asked.validation_draws) * largest, asked.draws * query)
    if len(order) < needed[0] or len(judges) < needed[1]:
        raise ValueError(
            f"draws, query: need {needed} windows of the two files, got {(len(order), len(judges))}; lower them"
        )

    def supports(draw: int) -> list[Example]:
        return order[draw * largest :][:shots]

    held = order[(asked.draws + asked.validation_draws) * largest :]
    test = [Task(f"draw {i + 1}", supports(i), judges[i * query :][:query]) for i in range(asked.draws)]
    validation = [
        Task(f"validation draw {i + 1}", supports(asked.draws + i), held[i * query :][:query])
        for i in range(asked.validation_draws)
    ]
    return {
        "train": TaskSet([], "train"),
        "validation": TaskSet(validation, "validation"),
        "test": TaskSet(test, "test"),
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "wikitext2", draws=4, validation_draws=2, query=24, steps=30)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--context", type=int, default=64)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    read = {part: pooled(read_wikitext(folder("wikitext2") / f"{part}.txt"), part) for part in ("valid", "test")}
    others: dict[str, tuple[Record, ...]] = {
        **read_books(folder("classic_books") / "classic_books.tar.gz"),
        **read_masc(folder("masc") / "masc_tagged_no_email.tar.gz"),
    }
    tokenizer = train_tokenizer((record.target for records in others.values() for record in records), asked.vocabulary)
    cut = partial(windows, tokenizer=tokenizer, length=asked.context)
    text = [item.example for items in cut(others).items.values() for item in items]
    texts = {part: [item.example for item in cut(groups).items[part]] for part, groups in read.items()}
    losses: Losses = {}
    model = partial(pretrained, tokenizer, text, asked, 16, losses)

    points = sweep()
    steps = (0, asked.steps // 3, asked.steps)

    def comparison(label: str, seed: int) -> Comparison:
        name, count, rank = points[label]
        rates = (3e-4, 1e-3) if name == "finetune" else (1e-3, 4e-3)
        inner = [InnerConfig(steps=asked.steps, lr=lr, batch_size=8) for lr in rates]
        return Comparison(
            partial(model, seed),
            **drawn(texts, count, asked),
            tarp=TarpConfig(r=rank, kind=KINDS.get(name, "dynamic")),
            inner={"finetune": inner, "lora": inner, "tarp-nometa": inner},
            steps=steps,
            seed=seed,
            run_dir=asked.run_dir / f"seed-{seed}" / label.replace(", ", "-").replace(" ", "-"),
        )

    study = Study(
        "WikiText-2, examples and rank",
        "WikiText-2: perplexity against the number of windows",
        asked.out,
        asked.run_dir / "wikitext2.png",
        settings_of(asked),
        f"one CPU thread of a shared machine; {asked.pretrain_steps} steps of pretraining, "
        f"{asked.steps} steps of 8 windows to adapt",
        claims(),
        PUBLISHED,
        {
            "data": {
                "adapted_to": "windows of WikiText-2's validation file; its training file is not here",
                "judged_on": "windows of its test file",
                "windows": {part: len(found) for part, found in texts.items()},
                "pretraining_windows": len(text),
            },
            "pretraining_losses": losses,
            "not_as_in_the_paper": "a model of about a million parameters trained here on other text; windows of "
            f"{asked.context} tokens of a vocabulary of its own, so perplexities are not those of words",
            "at_one_rank": "dynamic TARP adapts more numbers than its static relatives, see adapted_parameters",
        },
        places={
            label: (name if rank == RANK and name in METHODS else f"{name}, rank {rank}", count)
            for label, (name, count, rank) in points.items()
        },
        x="shots",
    )
    labels = {label: name if name in METHODS else "tarp-nometa" for label, (name, _, _) in points.items()}
    run_methods(study, labels, comparison, range(asked.seeds), asked.minutes)
    study.draw()
    study.write()


if __name__ == "__main__":
    main()
