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
NAMED = 9  # lines of the picture, from the best: as many as can be told apart
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
    there = sum(map(math.isfinite, reached))
    steps = estimate(np.array(reached)) if there == len(reached) else None
    delta = None if baseline is None or baseline is row else paired(losses, finals(baseline))
    return [
        row["optimizer"],
        f"{row['factor']:g}{edge}",
        with_interval(mean, 4),
        "–" if delta is None else with_interval(delta, 4, sign="+"),
        _reached(there, len(reached)) if steps is None else with_interval(steps, 0),
        "–" if steps is None else f"{steps.mean / last:.2f}",
    ]


def _reached(there: int, runs: int) -> str:
    return f"by {there} of {runs}" if there else "not reached"


def digest(rows: Sequence[Row]) -> str:
    shown = [[row["optimizer"], row["factor"], row["finals"]] for row in rows]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def picture(rows: Sequence[Row], path: Path) -> Path:
    """Held-out loss against the step, the mean over seeds and their range: the best and the
    baseline in colours, the others behind them. Whole or not at all.
    """
    ranked = [row for row in _ranked(rows) if all(found["curve"] for found in row["finals"])]
    named = [row for n, row in enumerate(ranked) if n < NAMED or row["optimizer"] == BASELINE]
    with matplotlib.rc_context({"font.size": 10, "axes.prop_cycle": COLORS}):
        figure = Figure(figsize=(9.0, 5.5), layout="constrained")
        axes = figure.subplots()
        for row in ranked:
            if row not in named:
                axes.plot(*_curve(row)[:2], color="gray", linewidth=0.6, alpha=0.5)
        for row in named:
            steps, mean, low, high = _curve(row)
            (line,) = axes.plot(steps, mean, label=row["optimizer"], linewidth=1.8)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if len(named) < len(ranked):
            axes.plot(
                [], [], color="gray", linewidth=0.6, label=f"{len(ranked) - len(named)} others"
            )
        axes.axhline(target_of(rows), color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", ylabel="held-out loss, nats")
        axes.spines[["top", "right"]].set_visible(False)
        best = min(float(np.mean(finals(row))) for row in rows)
        axes.set_ylim(0.98 * best, 1.6 * target_of(rows))
        axes.legend(fontsize=9, loc="upper right", frameon=False)
        return save(figure, path, digest(rows))


def _curve(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps; the mean, the least and the largest loss over seeds at each."""
    curves = [np.array(found["curve"]) for found in row["finals"]]
    losses = np.stack([curve[:, 1] for curve in curves])
    return curves[0][:, 0], losses.mean(0), losses.min(0), losses.max(0)
