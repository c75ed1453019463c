"""The results of the experiments on real data as the tables of benchmarks/README.md.

python -m benchmarks.experiments.table
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiments.common import RESULTS

NAMES = ("persona_chat", "multi_domain", "data_to_text", "wikitext2")


def table(folder: Path = RESULTS) -> str:
    """Markdown: perplexity by token of every method, then what became of the paper's orderings."""
    rows = ["| experiment | method | seeds | before adaptation | at the chosen step |", "|---|---|---|---|---|"]
    verdicts = ["| experiment | holds | is not settled | is reversed |", "|---|---|---|---|"]
    for name in NAMES:
        found = json.loads((folder / f"{name}.json").read_text())
        for label, method in found["methods"].items():
            by_seed, stops = method["perplexity_by_token"], method["stop_step"]
            before = [curve["0"] for curve in by_seed.values()]
            chosen = [curve[str(stops[seed])] for seed, curve in by_seed.items()]
            shown = label if method["valid"] else f"{label} (invalid)"
            rows.append(f"| {name} | {shown} | {len(by_seed)} | {_mean(before)} | {_mean(chosen)} |")
        cells = [_claims(found, verdict) for verdict in ("holds", "is not settled", "is reversed")]
        verdicts.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *verdicts, ""])


def _claims(found: Mapping[str, Any], verdict: str) -> str:
    return "; ".join(_short(entry) for entry in found["orderings"] if entry["verdict"] == verdict) or "none"


def _short(entry: Mapping[str, Any]) -> str:
    """What is claimed and where, without what the paper has."""
    claim = entry["in_words"].split(": ", 1)[0].removesuffix(" at the steps chosen on validation tasks")
    return claim if entry["valid"] else f"{claim} (invalid)"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if len(known) == len(values) else "infinite"


if __name__ == "__main__":
    print(table(), end="")
