"""What training wins back of what was cut away: held-out loss against its tokens, from records.

A curve begins with the loss of the model as it was made, before any token, and goes on with what
was evaluated meanwhile; the last point is of the weights as they are saved.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from experiments.papers.lookup import Find, NotRecorded, Run
from experiments.plots import COLORS, save
from experiments.report import Record, label, loss_differences

METRIC = "cross_entropy"


class Curve(NamedTuple):
    name: str  # of what was trained
    tokens: list[int]
    losses: list[float]  # nats per token, held out


def curves(records: Iterable[Record], reference: Record, find: Find) -> list[Curve]:
    """Of every training that was looked at more than once, from what a compression made, whose own
    record is there too; on the windows of the reference.
    """
    found = []
    for record in records:
        model = record["config"].get("model") or {}
        if record["command"] != "train" or model.get("command") != "compress":
            continue
        seen = record["training"].get("curves", {}).get(METRIC, [])
        if len(seen) > 1 and loss_differences(record, reference) is not None:
            try:
                (start, *_) = find(Run("compress", tuple(model["overrides"])))
            except NotRecorded:
                continue
            found.append(_curve(record, start, seen))
    return sorted(found, key=lambda curve: curve.losses[-1])


def _curve(record: Record, start: Record, seen: Sequence[Sequence[Any]]) -> Curve:
    each = record["config"]["batch"] * (record["data"]["calibration"][1] + 1)
    inside = seen[:-1]
    return Curve(
        label(start),
        [0, *(step * each for step, _ in inside), seen[-1][0] * each],
        [_loss(start), *(loss for _, loss in inside), _loss(record)],
    )


def _loss(record: Record) -> float:
    return record["metrics"]["perplexity"]["loss"]


def digest(found: Sequence[Curve], reference: Record) -> str:
    shown = [[*map(list, found)], _loss(reference)]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def picture(found: Sequence[Curve], reference: Record, path: Path) -> Path:
    """Whole or not at all."""
    with matplotlib.rc_context({"font.size": 10, "axes.prop_cycle": COLORS}):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for curve in found:
            axes.plot(curve.tokens, curve.losses, marker="o", markersize=4, label=curve.name)
        axes.axhline(_loss(reference), color="black", linewidth=0.8, linestyle="--",
                     label="the model as it is")  # fmt: skip
        axes.set(xlabel="tokens of distillation", ylabel="held-out loss, nats per token")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, frameon=False)
        return save(figure, path, digest(found, reference))
