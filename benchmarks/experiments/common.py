"""What the experiments on real data share: where the data lie, runs of the methods by seed, and results as JSON with
intervals and the paper's orderings, which are computed and never written by hand.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from mltd.baselines import Comparison, MethodResult, run_method
from mltd.curve_plots import curve_bands
from mltd.curves import curve_records, with_intervals
from mltd.intervals import Interval, paired_difference
from mltd.machine import facts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
SHOWN = {"tarp": "TARP, meta-trained", "tarp-nometa": "TARP", "mltd": "MLtD: TARP and cells"}
"""How pictures call methods whose names the benchmarks of single layers use for something else."""


def folder(name: str) -> Path:
    """The folder of a corpus under TARP_DATA. Raises FileNotFoundError that names the one that is absent."""
    found = Path(os.environ.get("TARP_DATA", ROOT.parent / "shared" / "data")) / name
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: no such folder, expected the corpus {name}; set TARP_DATA to where it lies")
    return found


class Claim(NamedTuple):
    """An ordering: `better` has the lower perplexity, at `step`, or where each method chose to stop.

    published  what the paper has for it, or why it is expected
    """

    better: str
    worse: str
    published: str
    step: int | None = None


@dataclass
class Study:
    """What an experiment has found so far; `write` gives a whole result at any time.

    title      of the picture, which is drawn over x, "step" or "shots"
    notes      what the reader must know, as JSON
    invalid    label -> why its numbers do not count
    places     label -> its curve and its number of support examples, where these vary
    """

    name: str
    title: str
    out: Path
    picture: Path
    settings: Mapping[str, Any]
    budget: str
    claims: Sequence[Claim]
    published: Mapping[str, Any]
    notes: Mapping[str, Any]
    invalid: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    x: Literal["step", "shots"] = "step"
    results: dict[str, dict[int, MethodResult]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    further_orderings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, label: str, seed: int, result: MethodResult) -> None:
        """Keep a result, show it and write everything so far."""
        self.results.setdefault(label, {})[seed] = result
        curve = ", ".join(f"{step}: {ppl:.2f}" for step, ppl in result.curve.perplexity_by_step.items())
        print(f"seed {seed}, {label}: perplexity by step {curve}; stops at {result.stop_step}", flush=True)
        self.write()

    def table(self) -> pd.DataFrame:
        """Every perplexity as `mltd.curves` takes it."""
        rows = []
        for label, by_seed in self.results.items():
            method, shots = self.places.get(label, (label, 0))
            for seed, result in by_seed.items():
                rows.append(curve_records(result.curve.per_task, "perplexity", seed=seed, shots=shots, method=method))
        return pd.concat(rows, ignore_index=True)

    def write(self) -> None:
        points = with_intervals(self.table())
        made = {
            "experiment": self.name,
            "settings": self.settings,
            "budget": self.budget,
            "done": {label: sorted(by_seed) for label, by_seed in self.results.items()},
            "seconds": round(sum(result.seconds + result.select_seconds for result in self._all())),
            **self.notes,
            "methods": {label: self._method(label) for label in self.results},
            "perplexity_mean_over_tasks": plain_points(points),
            **self.extra,
            "published": self.published,
            "orderings": orderings(self.results, self.claims, self.invalid) + self.further_orderings,
            "machine": facts(),
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(made, indent=1) + "\n")

    def draw(self) -> None:
        """The curves as a picture."""
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        points = with_intervals(self.table()).replace({"method": SHOWN})
        if self.x == "shots":  # a method known for one number of them is no curve
            points = points[points.groupby("method")["shots"].transform("nunique") > 1]
        if len(points):
            curve_bands(points, self.title, self.picture, self.x)

    def _all(self) -> list[MethodResult]:
        return [result for by_seed in self.results.values() for result in by_seed.values()]

    def _method(self, label: str) -> dict[str, Any]:
        by_seed = self.results[label]
        last = next(reversed(by_seed.values()))
        made: dict[str, Any] = {"valid": label not in self.invalid}
        if label in self.invalid:
            made["reason"] = self.invalid[label]
        return made | {
            "adapted_parameters": last.parameters,
            "perplexity_by_token": {
                str(seed): {str(step): rounded(ppl) for step, ppl in result.curve.perplexity_by_step.items()}
                for seed, result in by_seed.items()
            },
            "stop_step": {str(seed): result.stop_step for seed, result in by_seed.items()},
            "inner": {str(seed): result.inner and _chosen(result.inner) for seed, result in by_seed.items()},
            "train_tokens": last.train_tokens,
            "train_seconds": round(last.train_seconds, 1),
            "adapt_seconds": round(last.adapt_seconds, 1),
        }


def _chosen(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inner[name] for name in ("optimizer", "lr", "batch_size")}


def orderings(
    results: Mapping[str, Mapping[int, MethodResult]], claims: Sequence[Claim], invalid: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Each claim whose methods have run to its step, with the paired ratio of perplexities and a verdict in words.

    One about a method whose numbers are invalid is marked so.
    """
    found = []
    for claim in claims:
        both = shared_seeds(results, claim)
        curves = [results[label][seed].curve for label in (claim.better, claim.worse) for seed in both]
        if both and all(claim.step is None or claim.step in curve.steps for curve in curves):
            one, other = (
                _log_perplexities({seed: results[label][seed] for seed in both}, claim.step)
                for label in (claim.better, claim.worse)
            )
            valid = claim.better not in invalid and claim.worse not in invalid
            found.append(ordering(claim, paired_difference(one, other)) | {"valid": valid})
    return found


def shared_seeds(results: Mapping[str, Mapping[int, Any]], claim: Claim) -> list[int]:
    """The seeds that both methods of a claim have: another seed is another pretrained model."""
    return sorted(set(results.get(claim.better, ())) & set(results.get(claim.worse, ())))


def ordering(claim: Claim, difference: Interval) -> dict[str, Any]:
    """The verdict on a claim from the interval of log perplexity, better − worse."""
    mean, low, high = (math.exp(value) for value in difference[:3])
    verdict = "holds" if high < 1 else "is reversed" if low > 1 else "is not settled"
    where = "at the steps chosen on validation tasks" if claim.step is None else f"at step {claim.step}"
    return {
        "claim": f"{claim.better} below {claim.worse} ({claim.published})",
        "verdict": verdict,
        "in_words": f"{claim.better} below {claim.worse} {where}: {verdict}. The perplexity of {claim.better} is "
        f"{mean:.3f} times that of {claim.worse} (95 % interval {low:.3f} to {high:.3f} over {difference.tasks} tasks, "
        f"paired; seeds: {difference.seeds}). Expected from: {claim.published}.",
        "ratio": [rounded(value) for value in (mean, low, high)],
    }


def _log_perplexities(by_seed: Mapping[int, MethodResult], step: int | None) -> pd.DataFrame:
    """Columns task, seed, value: ratios of perplexities are differences of these, and no hard task outweighs others."""
    rows = []
    for seed, result in by_seed.items():
        at = result.stop_step if step is None else step
        rows += [(task, seed, math.log(curve[at])) for task, curve in result.curve.per_task.items()]
    return pd.DataFrame(rows, columns=["task", "seed", "value"])


def plain_points(points: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON, whose numbers are short; null where an interval is not defined."""
    return [
        {name: rounded(value) if isinstance(value, float) else value for name, value in row.items()}
        for row in points.to_dict("records")
    ]


def rounded(value: float) -> float | None:
    """Five digits, None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def run_methods(
    study: Study,
    labels: Mapping[str, str],
    comparison: Callable[[str, int], Comparison],
    seeds: Iterable[int],
    minutes: float,
    after: Callable[[str, int, Comparison, MethodResult], None] | None = None,
) -> None:
    """Run every label's method for every seed, and write after each; none begins after `minutes` have passed.

    What a run directory has is read back at any time, so that `minutes` of 0 only writes it down anew.

    labels      label -> a name of mltd.baselines.METHODS
    comparison  (label, seed) -> what it is run on
    after       called with each result, for what else is measured
    """
    begun = time.perf_counter()
    for seed in seeds:
        for label, method in labels.items():
            asked = comparison(label, seed)
            known = asked.run_dir is not None and (asked.run_dir / method / "result.json").exists()
            if not known and (time.perf_counter() - begun) / 60 > minutes:
                print(f"{minutes:g} minutes are over: seed {seed}, {label} is left out", flush=True)
                continue
            result = run_method(method, asked, progress=False)
            if after is not None:
                after(label, seed, asked, result)
            study.add(label, seed, result)


def arguments(doc: str | None, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all experiments have; `defaults` are numbers, an option for each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = {"seeds": 2, "minutes": 15.0, "iterations": 100, "pretrain_steps": 600, "width": 128, "layers": 4}
    for option, value in {**common, **defaults}.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "experiments" / name)
    return parser


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON, without the places on this disk and when to stop: `done` says what was reached."""
    return {n: value for n, value in vars(asked).items() if not isinstance(value, Path) and n != "minutes"}
