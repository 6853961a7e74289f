"""What a race of optimizers came to: its table and its picture, from the record of the benchmark.

Steps to a target are those after which the held-out loss was first no more than it, with straight
lines between evaluations; the target is the mean final loss of the baseline.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.plots import COLORS, save
from experiments.report import with_interval
from experiments.statistics import estimate, paired

BASELINE = "adamw"
Row = Mapping[str, Any]  # of measurements.optimizers


def finals(row: Row) -> np.ndarray:
    return np.array([found["loss"] for found in row["finals"]])


def target_of(rows: Sequence[Row]) -> float:
    """What is to be reached: the baseline's mean, or the first row's where it did not run."""
    named = {row["optimizer"]: row for row in rows}
    return float(np.mean(finals(named.get(BASELINE, rows[0]))))


def steps_to(curve: Sequence[Sequence[float | int]], target: float) -> float:
    """Infinite where it is not reached."""
    before: Sequence[float | int] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return math.inf


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The best final loss first."""
    target, named = target_of(rows), {row["optimizer"]: row for row in rows}
    head = ["optimizer", "learning rates ×", "final loss", f"Δ to {BASELINE}, paired"]
    head += [f"steps to {target:.3f}", "of the last step"]
    return [head, *(_cells(row, named.get(BASELINE), target) for row in _ranked(rows))]


def _ranked(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: float(np.mean(finals(row))))


def _cells(row: Row, baseline: Row | None, target: float) -> list[str]:
    edge = "" if row["inside"] else " (edge)"
    losses = finals(row)
    mean = estimate(losses)
    reached = [steps_to(found["curve"], target) for found in row["finals"]]
    last = row["finals"][0]["curve"][-1][0] if row["finals"][0]["curve"] else math.nan
    steps = estimate(np.array(reached)) if all(map(math.isfinite, reached)) else None
    delta = None if baseline is None or baseline is row else paired(losses, finals(baseline))
    return [
        row["optimizer"],
        f"{row['factor']:g}{edge}",
        with_interval(mean, 4),
        "–" if delta is None else with_interval(delta, 4, sign="+"),
        "not reached" if steps is None else with_interval(steps, 0),
        "–" if steps is None else f"{steps.mean / last:.2f}",
    ]


def digest(rows: Sequence[Row]) -> str:
    shown = [[row["optimizer"], row["factor"], row["finals"]] for row in rows]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def picture(rows: Sequence[Row], path: Path) -> Path:
    """Held-out loss against the step, the mean over seeds and their range; whole or not at all."""
    with matplotlib.rc_context({"font.size": 10, "axes.prop_cycle": COLORS}):
        figure = Figure(figsize=(9.5, 6.0), layout="constrained")
        axes = figure.subplots()
        for row in _ranked(rows):
            curves = [np.array(found["curve"]) for found in row["finals"] if found["curve"]]
            if not curves:
                continue
            steps, losses = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
            (line,) = axes.plot(steps, losses.mean(0), label=row["optimizer"], linewidth=1.5)
            axes.fill_between(
                steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0
            )
        axes.axhline(target_of(rows), color="gray", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", ylabel="held-out loss, nats", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        best = min(float(np.mean(finals(row))) for row in rows)
        axes.set_ylim(0.98 * best, 1.6 * target_of(rows))
        figure.legend(fontsize=8, loc="outside right upper", frameon=False)
        return save(figure, path, digest(rows))
