"""Tables of training runs, from their records."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.report import Record, labels, scores

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
