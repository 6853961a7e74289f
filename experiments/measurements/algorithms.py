"""What compressing takes with each algorithm beside the first, in turns, each run a process of its
own: by the clock, without compilation.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import Record, label

type Runner = Callable[[str, Path, list[str]], Record]  # command, folder, overrides


def algorithm_costs(plain: dict[str, Any], folder: Path, run: Runner) -> list[dict[str, Any]]:
    """Of each algorithm: what it is, its seconds in every turn, by phase, and as a multiple of the
    first one's.
    """
    settings = plain["algorithm_costs"]
    turns = [
        [
            run("compress", folder / f"algorithm-{n}-{turn}", [*settings["run"], *overrides])
            for n, overrides in enumerate(settings["algorithms"])
        ]
        for turn in range(settings["turns"])
    ]
    firsts = [seconds(turn[0]) for turn in turns]
    return [_row(found, firsts) for found in zip(*turns, strict=True)]


def _row(found: Sequence[Record], firsts: Sequence[float]) -> dict[str, Any]:
    own = [seconds(record) for record in found]
    return {
        "algorithm": label(found[0]),
        "seconds": own,
        "compile_seconds": statistics.median(r["seconds"]["compress_compile"] for r in found),
        "phases_with_compile": {
            phase: statistics.median(phases(record)[phase] for record in found)
            for phase in phases(found[0])
        },
        "times_first": statistics.median(a / b for a, b in zip(own, firsts, strict=True)),
    }


def seconds(record: Record) -> float:
    """Of compressing, without compilation."""
    return record["seconds"]["compress"] - record["seconds"]["compress_compile"]


def phases(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase, over all layers, compilation included."""
    total: Counter[str] = Counter()
    for layer in record["layers"]:
        total.update(layer["seconds"])
    return dict(total)
