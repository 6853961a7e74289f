"""Tables from records."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Record = dict[str, Any]


def label(record: Record) -> str:
    """What was done to the model, in a few words: "GPTQ 4 bit g64"."""
    recipe = record.get("recipe") or [record["config"].get("algorithm")]
    return " + ".join(_step_label(step) for step in recipe if step) or "float"


def _step_label(step: dict[str, Any]) -> str:
    words = [step["_target_"].rsplit(".", 1)[-1].upper()]
    if "bits" in step:
        words.append(f"{step['bits']} bit")
    if "group_size" in step:
        words.append("per channel" if step["group_size"] is None else f"g{step['group_size']}")
    if step.get("symmetric"):
        words.append("symmetric")
    return " ".join(words)


def bits_per_weight(record: Record) -> float | None:
    """Over the compressed layers, everything counted; None for a model left as it is."""
    size = record.get("footprint")
    return size["weight_bits"] / size["weights"] if size and size["weights"] else None


def cells(record: Record) -> list[str]:
    """One row: method, bits per weight, size on disk, perplexity, seconds, peak memory."""
    metrics, bits = record["metrics"].get("perplexity"), bits_per_weight(record)
    seconds = record["seconds"].get("compress")
    return [
        label(record),
        "–" if bits is None else f"{bits:.2f}",
        f"{record['bytes_on_disk'] / 1e6:.1f}",
        f"{metrics['value']:.2f} ± {metrics['standard_error']:.2f}" if metrics else "–",
        "–" if seconds is None else f"{seconds:.0f}",
        f"{record['peak_memory'] / 1e9:.2f}",
    ]


HEADER = ("method", "bits per weight", "on disk, MB", "perplexity", "compress, s", "peak, GB")


def table(records: Sequence[Record]) -> Table:
    """For the terminal."""
    drawn = Table(*HEADER)
    for column in drawn.columns[1:]:
        column.justify = "right"
    for record in records:
        drawn.add_row(*cells(record))
    return drawn


def markdown(records: Sequence[Record]) -> str:
    """For a document."""
    rows = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(cells, records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
