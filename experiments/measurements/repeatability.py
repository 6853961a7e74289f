"""How far a result moves where nothing but the order of sums does: the same compressions on other
numbers of cores, each run a process of its own.

A sum of float32 in another order differs by rounding. Where that decides which weight goes, or to
which code one is rounded, what comes after adapts to it, layer by layer.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.measurements.algorithms import Runner
from experiments.report import label, paired_difference


def repeatability(plain: dict[str, Any], folder: Path, run: Runner) -> list[dict[str, Any]]:
    """Of each compression: its perplexity on each number of cores, and the difference in loss of
    the last from the first, paired by window.
    """
    settings = plain["repeatability"]
    rows = []
    for n, overrides in enumerate(settings["runs"]):
        found = []
        for count in settings["cores"]:
            with _on(count):
                found.append(run("compress", folder / f"repeat-{n}-on-{count}", overrides))
        difference = paired_difference(found[-1], found[0])
        assert difference is not None  # the same windows
        rows.append(
            {
                "run": label(found[0]),
                "cores": settings["cores"],
                "perplexity": [each["metrics"]["perplexity"]["value"] for each in found],
                "difference": difference[0],
                "standard_error": difference[1],
            }
        )
    return rows


@contextlib.contextmanager
def _on(count: int) -> Iterator[None]:
    """Processes that are begun within may use so many cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("repeatability: this system does not let a process choose its cores.")
    before = os.sched_getaffinity(0)
    if not 0 < count <= len(before):
        raise UserError(
            f"repeatability.cores: {count} must be from 1 to the {len(before)} that there are."
        )
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
