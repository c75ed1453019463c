"""What ``tarp demo`` runs: data, adapter, budgets and learning rates, in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from mltd.inner_loop import InnerConfig
from mltd.machine import versions
from mltd.meta_config import MetaConfig
from tarp_kernels import TarpConfig

METHODS = ("zero-shot", "finetune", "lora", "tarp-nometa", "tarp-multitask", "mltd")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a demo run besides the packages' versions.

    split   arguments of ``split_topics``
    tarp    the adapter of the three TARP methods; LoRA gets as many parameters
    steps   adaptation steps to report
    inner   method -> candidates of how to adapt; the one that is best on the validation topics is taken
    meta    "mltd" and "tarp-multitask" -> candidates of how to train
    replies topics to show generated replies for
    rounds  of the speed measurement
    """

    split: Mapping[str, int] = field(default_factory=dict)
    tarp: TarpConfig = TarpConfig(r=8)
    steps: tuple[int, ...] = (0, 1, 3, 5, 10)
    inner: Mapping[str, Sequence[InnerConfig]] = field(default_factory=dict)
    meta: Mapping[str, Sequence[MetaConfig]] = field(default_factory=dict)
    replies: int = 3
    rounds: int = 11

    def fingerprint(self) -> str:
        """A digest of the recipe and the versions that decide its results: equal for runs that can be continued."""
        decisive = {name: versions()[name] for name in ("tarp_kernels", "torch", "transformers", "peft")}
        plain = json.dumps([asdict(self), decisive], sort_keys=True, default=str)
        return hashlib.sha256(plain.encode()).hexdigest()


# From grids on the validation topics, perplexity at the best step: both adapters without meta-learning 34.4 and 35.0 at
# an Adam rate of 4e-3 with a decay of 0.6 a step (2e-3 with 0.8: 34.6 and 36.4), all weights 35.3 at 1.2e-4 (6e-5:
# 38.9). For the trained starts 2e-3 with 0.6; an outer rate of 2e-3 beats 1e-3 in joint training (29.4 and 31.3 after
# 15 iterations), and in meta-training if it decays. Query gradients after several inner steps instead of the last one
# cost 1.6 times as much for the same score. A weak decay over-fits: TARP at 2e-3 with 0.8 goes from 34.6 after 5 steps
# to 45.3 after 10.
_ADAPTER = InnerConfig(lr=4e-3, lr_decay=0.6)
_META = InnerConfig(steps=3, lr=2e-3, lr_decay=0.6)

RECIPE = Recipe(
    split={"test_topics": 5, "validation_topics": 2},
    inner={
        "finetune": [InnerConfig(lr=1.2e-4, lr_decay=0.6)],
        "lora": [_ADAPTER],
        "tarp-nometa": [_ADAPTER],
    },
    meta={
        name: [MetaConfig(_META, iterations=14, outer_lr=2e-3, outer_schedule="linear", validate_every=7)]
        for name in ("mltd", "tarp-multitask")
    },
)
