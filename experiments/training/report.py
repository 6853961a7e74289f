"""Tables of training runs, from their records."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.comparison import Row, compare, experiments
from experiments.papers.claims import PERPLEXITY, p_value
from experiments.report import Record, grid, labels, scores, with_interval

HEADER = ("run", "held-out loss", "accuracy", "perplexity", "parameters", "seconds", "GB")
FOOTNOTE = (
    "held-out loss: nats, of the parameters that are saved; ± standard error over windows; seconds "
    "to train; GB: peak memory."
)


def table(records: Sequence[Record]) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=FOOTNOTE, caption_justify="left")
    for number, name in enumerate(HEADER):
        drawn.add_column(name, justify="right" if number else "left", no_wrap=True)
    for record, name in zip(records, labels(records), strict=True):
        drawn.add_row(name, *cells(record))
    return drawn


def cells(record: Record) -> list[str]:
    """In the order of HEADER, without the first."""
    held: dict[str, Any] = record["training"]["heldout"]
    found = scores(record) if "metrics" in record else None
    return [
        f"{held['loss']:.4f}",
        f"{100 * held['accuracy']:.2f} %" if "accuracy" in held else "–",
        f"{found['value']:.2f} ± {found['standard_error']:.2f}" if found else "–",
        f"{record['model']['parameters']:,}",
        f"{record['seconds']['train']:.0f}",
        f"{record['peak_memory'] / 1e9:.2f}",
    ]


# Every objective's cross-entropy, as their own losses are not of one kind.
LOSS, ACCURACY = "training.heldout.cross_entropy", "training.heldout.accuracy"
COMPARED = (
    "loss: held-out cross-entropy, nats, of the parameters that are saved; ±: half of the 95 % "
    "interval (Student's t) over seeds, or over held-out windows where there is one seed; Δ: "
    "paired by the same, to the first row; p: of no difference, adjusted by Holm for all rows; s: "
    "to train, of the first seed."
)


def markdown(records: Sequence[Record]) -> str:
    """For a document: experiments beside the first one, their seeds together."""
    found = experiments(records)
    metric = ACCURACY if "accuracy" in records[0]["training"]["heldout"] else LOSS
    if all(len(each.records) == 1 and "metrics" in each.records[0] for each in found):
        metric = PERPLEXITY  # whose windows stand in for seeds
    what = "accuracy, %" if metric == ACCURACY else "loss"
    lines = [["run", "seeds", what, f"Δ {what}", "p", "parameters", "s"]]
    lines += [
        _compared(row, *((2, 100) if metric == ACCURACY else (4, 1)))
        for row in compare(found, metric, reference=found[0].name)
    ]
    return f"{grid(lines)}\n\n{COMPARED}\n"


def _compared(row: Row, digits: int, scale: int) -> list[str]:
    first: Record = row.experiment.records[0]
    return [
        row.experiment.name,
        str(len(row.experiment.records)),
        with_interval(row.found, digits, scale=scale),
        row.difference_over
        if row.difference is None
        else with_interval(row.difference, digits, "+", scale),
        "–" if math.isnan(row.p) else p_value(row.p).removeprefix("= "),
        f"{first['model']['parameters']:,}",
        f"{first['seconds']['train']:.0f}",
    ]
