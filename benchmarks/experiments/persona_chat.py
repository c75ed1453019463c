"""Persona-Chat: does a meta-learnt start adapt to an unseen person's way of talking better than fine-tuning does?

    python -m benchmarks.experiments.persona_chat       # writes benchmarks/experiments/results/persona_chat.json

One persona is one task. A small GPT-2 is trained here on dialogues of the training personas, then each of the paper's
methods adapts to some dialogues of real validation personas (ConvAI2) and is judged on others of the same
persona, by the perplexity of the replies alone. Meta-training uses the training personas with at least two dialogues.
Synthetic-Persona-Chat is left out: its validation personas are those of ConvAI2, so training on it would leak.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.experiments.common import (
    Claim,
    Study,
    arguments,
    folder,
    run_methods,
    settings_of,
)
from benchmarks.experiments.small_model import Losses, pretrained, small_gpt2, train_tokenizer
from mltd import InnerConfig, MetaConfig
from mltd.baselines import Comparison
from mltd.data.dialogue import Dialogue, by_persona
from mltd.data.encoding import encode, windows
from mltd.data.episodes import draw
from mltd.data.persona_chat import read_convai2, read_personachat_csv
from mltd.data.records import Groups, Record, at_least, numbered
from mltd.data.splits import GroupSplit, split_groups
from tarp_kernels import SearchCellConfig, TarpConfig

STEPS = (0, 1, 3, 5, 7, 10)
LABELS = {  # what time may cut off comes last
    "finetune": "finetune",
    "tarp": "tarp",
    "mltd": "mltd",
    "maml": "maml",
    "maml from random weights": "maml",
}
PUBLISHED = {
    "perplexity": {
        "Pretrain+Finetune": 33.14,
        "MAML": 40.34,
        "Pretrain+MAML": 32.54,
        "MLtD (TARP)": 32.15,
        "MLtD": 28.14,
    },
    "steps": list(STEPS),
    "Pretrain+Finetune": [36.4, 35.1, 34.2, 33.7, 33.4, 33.1],
    "MLtD (TARP)": [34.6, 33.7, 32.9, 32.5, 32.3, 32.15],
    "labels": {
        "finetune": "Pretrain+Finetune",
        "maml from random weights": "MAML",
        "maml": "Pretrain+MAML",
        "tarp": "MLtD (TARP)",
        "mltd": "MLtD",
    },
}
CLAIMS = (
    Claim("tarp", "finetune", "paper: 32.15 against 33.14"),
    Claim("tarp", "maml", "paper: 32.15 against 32.54"),
    Claim("maml", "finetune", "paper: 32.54 against 33.14"),
    Claim("finetune", "maml from random weights", "paper: 33.14 against 40.34"),
    Claim("mltd", "tarp", "paper: 28.14 against 32.15, with cells that saw the next token"),
    Claim("tarp", "finetune", "paper: 34.6 against 36.4", step=0),
    Claim("tarp", "finetune", "paper: 33.7 against 35.1", step=1),
    Claim("tarp", "finetune", "paper: 32.15 against 33.1", step=10),
)


def strangers(unseen: Sequence[Dialogue], trained: Sequence[Dialogue]) -> list[Dialogue]:
    """The unseen dialogues without those by a persona that two sentences connect with one of training."""
    everyone = [d._replace(id=f"{side} {d.id}") for side, of in (("seen", trained), ("unseen", unseen)) for d in of]
    known: set[str] = set()
    for records in by_persona(everyone).values():
        units = {record.unit for record in records}
        if any(unit.startswith("seen ") for unit in units):
            known |= units
    return [dialogue for dialogue in unseen if f"unseen {dialogue.id}" not in known]


def personas(asked: argparse.Namespace) -> tuple[GroupSplit, Groups]:
    """Persona -> replies in three parts, and all training dialogues' replies but those held out for validation."""
    trained = read_personachat_csv(folder("personachat_train1072") / "personachat.csv")
    unseen = strangers(read_convai2(folder("convai2_valid") / "valid_self_original_no_cands.txt"), trained)
    read = partial(by_persona, history=asked.history)
    every = numbered(read(trained), "training persona")
    # validation tasks are as large as test tasks, for the best step depends on how much there is to adapt to
    large = list(at_least(every, asked.support + 1))[: asked.validation_tasks]
    parts = split_groups(at_least(every, asked.train_support + 1), validation=large, test=0)
    tested = at_least(numbered(read(unseen), "persona"), asked.support + asked.query)
    tested = dict(list(tested.items())[: asked.tasks])
    split = GroupSplit(parts.train, parts.validation, tested).without_duplicates()
    seen = {name: records for name, records in every.items() if name not in parts.validation}
    return split, seen


def as_text(groups: Groups) -> dict[str, tuple[Record, ...]]:
    """What is read and replied, a line an utterance, as one long text to be cut into windows."""
    texts = [f"{record.text}\n" for records in groups.values() for record in records]
    return {"dialogues": (Record("", ("".join(texts),), "all"),)}


def prepare(asked: argparse.Namespace) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Task sets, a maker of models by (seed, pretrained), and facts for the JSON."""
    split, seen = personas(asked)
    tokenizer = train_tokenizer((record.text for records in seen.values() for record in records), asked.vocabulary)
    limits: dict[str, Any] = {"max_length": asked.context, "too_long": "cut_start"}
    train, validation, test = (encode(part, tokenizer, **limits) for part in split)
    shots, few = asked.support, asked.train_support
    sets = {
        "train": draw(train.at_least(few + 1), "train", support=few, query=1).tasks,
        "validation": draw(validation.at_least(shots + 1), "validation", support=shots, query=1).tasks,
        "test": draw(test.at_least(shots + asked.query), "test", support=shots, query=asked.query).tasks,
    }
    text = [item.example for item in windows(as_text(seen), tokenizer, asked.context).items["dialogues"]]
    losses: Losses = {}

    def model(seed: int, with_weights: bool) -> Any:
        if with_weights:
            return pretrained(tokenizer, text, asked, 16, losses, seed)
        return small_gpt2(tokenizer, asked.width, asked.layers, asked.context, seed)

    notes = {
        "data": {
            "training_tasks": len(sets["train"]),
            "validation_tasks": len(sets["validation"]),
            "test_tasks": len(sets["test"]),
            "pretraining_windows": len(text),
            "not_used": "synthetic_persona_chat: its validation personas are those that are tested on",
        },
        "model": {"family": "gpt2", "parameters": sum(p.numel() for p in model(0, False).parameters())},
        "pretraining_losses": losses,
        "not_as_in_the_paper": "a model of about a million parameters trained here on 1,072 dialogues; few test "
        "personas, one fixed split of their dialogues instead of leave-one-dialogue-out; TARP methods train the "
        "adapter alone, not the base model; cells are causal",
    }
    return sets, model, notes


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "persona_chat", history=1, support=2, query=2, train_support=1, tasks=40)
    parser.add_argument("--validation-tasks", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--context", type=int, default=64)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    sets, model, notes = prepare(asked)
    tarp = TarpConfig(r=4, search_cell=SearchCellConfig(width=50))
    whole = [InnerConfig(steps=10, lr=lr, optimizer="sgd", clip=1.0) for lr in (0.05, 0.2)]
    whole.append(InnerConfig(steps=10, lr=3e-4, optimizer="adam"))
    small = [InnerConfig(steps=10, lr=lr, optimizer="adam") for lr in (5e-4, 2e-3, 5e-3)]
    trained_small = InnerConfig(steps=3, lr=2e-3)
    trained_whole = InnerConfig(steps=3, lr=0.05, optimizer="sgd", clip=1.0)

    def meta(inner: InnerConfig, lr: float, seed: int) -> list[MetaConfig]:
        return [
            MetaConfig(
                inner,
                iterations=asked.iterations,
                tasks_per_batch=min(4, len(sets["train"])),
                outer_lr=lr,
                outer_clip=1.0,
                query_steps=(0, 3),
                seed=seed,
                checkpoint_every=50,
            )
        ]

    def comparison(label: str, seed: int) -> Comparison:
        return Comparison(
            partial(model, seed, label != "maml from random weights"),
            **sets,
            tarp=tarp,
            inner={"finetune": whole, "maml": whole, "tarp": small, "mltd": small},
            meta={
                "maml": meta(trained_whole, 3e-4, seed),
                "tarp": meta(trained_small, 2e-3, seed),
                "mltd": meta(trained_small, 2e-3, seed),
            },
            steps=STEPS,
            seed=seed,
            run_dir=asked.run_dir / f"seed-{seed}" / label.replace(" ", "-"),
        )

    study = Study(
        "Persona-Chat, unseen personas",
        "Persona-Chat: perplexity of replies of unseen personas",
        asked.out,
        asked.run_dir / "persona_chat.png",
        settings_of(asked),
        f"one CPU thread of a shared machine; {asked.pretrain_steps} steps of "
        f"pretraining, {asked.iterations} outer steps of 4 tasks",
        CLAIMS,
        PUBLISHED,
        notes,
    )
    run_methods(study, LABELS, comparison, range(asked.seeds), asked.minutes)
    study.draw()
    study.write()


if __name__ == "__main__":
    main()
